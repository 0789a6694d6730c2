"""How many bytes a model's weights, caches and buffers take, and on which device."""
