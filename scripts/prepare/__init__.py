"""Data sets: fetched, converted to the line formats of the first implementation, and drawn into small sets."""
