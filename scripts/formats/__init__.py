"""Formats that export.py writes for other programs; those that the package also reads are in prefixlib."""
