"""A model as its GGUF header describes it."""
