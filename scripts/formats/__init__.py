"""Forms that export.py writes for other programs; those that the package reads as well are in prefixlib."""
