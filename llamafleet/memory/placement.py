"""Who holds what: a model's layers on devices and on the host."""

from __future__ import annotations

from dataclasses import dataclass

HOST = "host"


@dataclass(frozen=True)
class Placement:
    """Who holds what: a device number for each layer and, last, the output; None is the host."""

    layer_devices: tuple[int | None, ...]
    spilled: frozenset[int] = frozenset()  # layers on a device whose experts (FFN) are on the host
    # Layers of whose experts (FFN) only a part is there, and which: "down", or "up" for up and gate.
    partly: tuple[tuple[int, str], ...] = ()

    @property
    def moved(self) -> dict[int, str]:
        """Layers on a device with experts (FFN) on the host, and which of these: "all", "down" or "up"."""
        layers = ((layer, "all") for layer in self.spilled)
        return {layer: part for layer, part in (*layers, *self.partly) if self.layer_devices[layer] is not None}

    @property
    def devices(self) -> tuple[int, ...]:
        """The devices in use, in order."""
        return tuple(sorted({device for device in self.layer_devices if device is not None}))

    @property
    def gpu_layers(self) -> int:
        """For --n-gpu-layers: layers on devices, the output counted as one."""
        return sum(device is not None for device in self.layer_devices)

    def split(self) -> tuple[int, ...]:
        """For --tensor-split: layers of each device in use, which llama.cpp then assigns exactly so."""
        return tuple(self.layer_devices.count(device) for device in self.devices)


@dataclass(frozen=True)
class Segment:
    """Layers lo to hi on one device; of them those from `keep` on have their experts (FFN) on the host.

    `part`: of layer `keep` only these tensors are on the host ("down", or "up" for up and gate).
    """

    device: int | None
    lo: int
    hi: int
    keep: int
    part: str = ""
