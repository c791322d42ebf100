"""Starting a run, and its records."""
