"""What the gpt2 and seq2seq trees share: launching, base models, checkpoints, data readers, decoding, metrics."""
