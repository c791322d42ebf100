"""Fast computation of a step: nothing here changes a result."""
