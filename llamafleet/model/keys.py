"""A header's numbers by their keys; none of them is trusted."""

from __future__ import annotations

from llamafleet.model.gguf import Header
from llamafleet.model.gguf_cursor import Value


class Keys:
    """A header's numbers by their keys."""

    def __init__(self, header: Header) -> None:
        self.header, self.known = header, dict[str, Value | None]()
        self.layers = self.number("block_count")

    def get(self, key: str) -> Value | None:
        return self.header.get(key)

    def has(self, key: str) -> bool:
        """Is it there, and not 0, false or empty?"""
        return bool(self.get(key))

    def number(self, key: str, default: int = 0) -> int:
        """A whole number; the largest where there is one for each layer."""
        value = self.get(key)
        if isinstance(value, tuple):
            return max((int(item) for item in value if isinstance(item, int)), default=default)
        return max(0, int(value)) if isinstance(value, int | float) else default

    def per_layer(self, key: str, default: int = 0) -> tuple[int, ...]:
        """A whole number for each layer."""
        value = self.get(key)
        if isinstance(value, tuple) and len(value) >= self.layers:
            return tuple(int(item) if isinstance(item, int) else default for item in value[: self.layers])
        return (self.number(key, default),) * self.layers
