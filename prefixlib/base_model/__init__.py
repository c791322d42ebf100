"""The frozen base model: names, loading, checks; GGUF files, fewer bits, layers spread over processes."""
