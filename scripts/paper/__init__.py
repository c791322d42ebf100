"""The experiments of the paper that reproduce.py runs: rows, recipes, runs, tables."""
