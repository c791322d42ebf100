"""The ways to train: one row per --tuning_mode in table.py, and a module for each that changes the base model."""
