"""What benchmark.py measures: one module for each figure, its peers, its tables and plots."""
