"""What build_demo.py makes data/demo of: facts, sentences, articles, and two small language models."""
