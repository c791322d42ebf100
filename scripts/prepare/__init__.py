"""Data sets: fetching, converting to the line formats of the first implementation, and sampling small sets."""
