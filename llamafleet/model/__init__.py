"""A model's dimensions and tensors, read from its GGUF header."""
