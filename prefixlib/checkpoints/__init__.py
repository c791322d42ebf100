"""Stored models: the checkpoint formats of this package, the original and PEFT; the best checkpoint of a run."""
