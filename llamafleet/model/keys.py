"""Read a header's numbers by key; missing or wrong values get a default, and nothing is raised."""

from __future__ import annotations

from llamafleet.model.gguf import Header
from llamafleet.model.gguf_cursor import Value


class Keys:
    """A header's values by their keys, without the architecture's prefix."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.layers = self.number("block_count")

    def get(self, key: str) -> Value | None:
        return self.header.get(key)

    def has(self, key: str) -> bool:
        """Does the header have this key with a value that is not 0, false or empty?"""
        return bool(self.get(key))

    def number(self, key: str, default: int = 0) -> int:
        """A whole number; of an array with a value for each layer, the largest."""
        value = self.get(key)
        if isinstance(value, tuple):
            return max((int(item) for item in value if isinstance(item, int)), default=default)
        return max(0, int(value)) if isinstance(value, int | float) else default

    def per_layer(self, key: str, default: int = 0) -> tuple[int, ...]:
        """A whole number for each layer, from an array or a single value."""
        value = self.get(key)
        if isinstance(value, tuple) and len(value) >= self.layers:
            return tuple(int(item) if isinstance(item, int) else default for item in value[: self.layers])
        return (self.number(key, default),) * self.layers
