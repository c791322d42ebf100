"""The parts of data/demo, for build_demo.py: facts, sentences, articles, and two small language models."""
