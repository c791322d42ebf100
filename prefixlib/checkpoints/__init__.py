"""What is stored of a trained model: this package's format, the original's, PEFT's; the best one of a run."""
