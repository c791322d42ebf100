"""Settings as data: fields that are flags, the settings of a training run and of a search."""
