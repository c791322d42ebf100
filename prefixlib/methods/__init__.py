"""What can be trained: one row per --tuning_mode in table.py, a module for each that works inside the base model."""
