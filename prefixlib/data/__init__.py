"""Tasks and data: one row per task, readers, the user's own files, templates and conversations."""
