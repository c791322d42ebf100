"""Starting a run, and what it records of itself."""
