"""Shared by all parts: errors, files, processes, places. Standard library only."""
