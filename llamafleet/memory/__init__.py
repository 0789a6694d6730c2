"""Bytes: where a model's weights, caches and buffers go."""
