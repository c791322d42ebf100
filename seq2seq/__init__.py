"""Summarisation and table-to-text with an encoder-decoder: prefix module, Lightning loop, decoding."""
