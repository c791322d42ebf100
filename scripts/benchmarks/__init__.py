"""The measurements of benchmark.py: a module for each figure, its peers, its tables and plots."""
