"""Decoding for both families: search, the beams' shared cache, the loop over batches, text, output files."""
