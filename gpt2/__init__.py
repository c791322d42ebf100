"""Table-to-text with a decoder-only language model: prefix module, trainer, decoding."""
