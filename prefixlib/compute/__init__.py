"""How a step is computed fast: nothing here changes a result."""
