"""Shared by the gpt2 and seq2seq trees: launching, base models, checkpoints, data readers, decoding, metrics."""
