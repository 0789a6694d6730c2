"""Who holds what: a model's layers on devices and on the host."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

HOST = "host"


@dataclass(frozen=True)
class Segment:
    """Layers lo to hi on one device (None: the host); those from `keep` on have their experts (FFN) on the host.

    `part`: of layer `keep` only these tensors are on the host: "down", or "up" for up and gate; "": all of them.
    """

    device: int | None  # llama.cpp's number
    lo: int
    hi: int
    keep: int
    part: str = ""


@dataclass(frozen=True)
class Placement:
    """A model's layers from the front, in segments. The output is where the last segment is."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(
        cls,
        layer_devices: Sequence[int | None],
        spilled: Collection[int] = (),
        partly: Mapping[int, str] | None = None,
    ) -> Placement:
        """From a device for each layer and, last, for the output. `spilled`, `partly`: as the properties."""
        *holders, output = layer_devices
        parts = {**dict.fromkeys(spilled, ""), **(partly or {})}
        segments: list[Segment] = []
        for device, members in groupby(range(len(holders)), key=lambda layer: holders[layer]):
            segments += _segments(device, list(members), {} if device is None else parts)
        if not segments or segments[-1].device != output:
            segments.append(Segment(output, len(holders), len(holders), len(holders)))
        return cls(tuple(segments))

    @cached_property
    def layer_devices(self) -> tuple[int | None, ...]:
        """A device number for each layer and, last, for the output; None is the host."""
        holders = [one.device for one in self.segments for _ in range(one.lo, one.hi)]
        return (*holders, self.segments[-1].device)

    @cached_property
    def backends(self) -> tuple[int, ...]:
        """The same as ggml's scheduler numbers backends: the host comes behind the devices."""
        host = len(self.devices)
        return tuple(host if device is None else device for device in self.layer_devices)

    @cached_property
    def moved(self) -> Mapping[int, str]:
        """Layers on a device with experts (FFN) on the host, and which of these: "all", "down" or "up"."""
        moved: dict[int, str] = {}
        for one in self.segments:
            if one.device is not None:
                moved |= dict.fromkeys(range(one.keep, one.hi), "all")
                if one.part:
                    moved[one.keep] = one.part
        return moved

    @property
    def spilled(self) -> frozenset[int]:
        """Layers on a device whose experts (FFN) are all on the host."""
        return frozenset(layer for layer, part in self.moved.items() if part == "all")

    @property
    def partly(self) -> tuple[tuple[int, str], ...]:
        """Layers of whose experts (FFN) only a part is on the host, and which."""
        return tuple(sorted((layer, part) for layer, part in self.moved.items() if part != "all"))

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """The devices in use, in order."""
        return tuple(sorted({one.device for one in self.segments if one.device is not None}))

    @property
    def gpu_layers(self) -> int:
        """For --n-gpu-layers: layers on devices, the output counted as one."""
        return sum(device is not None for device in self.layer_devices)

    @property
    def uses_host(self) -> bool:
        """Does the CPU compute anything but the embedding?"""
        return None in self.layer_devices or bool(self.moved)

    @property
    def is_pipeline(self) -> bool:
        """Do devices work side by side on several batches (src/llama-context.cpp, llama_context)?"""
        return len(self.devices) > 1 and not self.uses_host

    def split(self) -> tuple[int, ...]:
        """For --tensor-split: layers of each device in use, which llama.cpp then assigns exactly so."""
        return tuple(self.layer_devices.count(device) for device in self.devices)

    def renumbered(self, numbers: Sequence[int]) -> Placement:
        """With `numbers[N]` for device N; devices that get the same number become one."""
        return Placement(
            tuple(one if one.device is None else replace(one, device=numbers[one.device]) for one in self.segments)
        )


def _segments(device: int | None, members: Sequence[int], parts: Mapping[int, str]) -> list[Segment]:
    """A run of layers of one device, cut where a layer keeps its experts behind one that does not, or parts differ."""
    found: list[Segment] = []
    for layer in members:
        last, part = (found[-1] if found else None), parts.get(layer)
        if part is None and last and last.keep == last.hi:
            found[-1] = replace(last, hi=layer + 1, keep=layer + 1)
        elif part is not None and last and (last.keep == last.hi or not part):
            found[-1] = replace(last, hi=layer + 1, keep=min(last.keep, layer), part=last.part or part)
        else:
            found.append(Segment(device, layer, layer + 1, layer + 1 if part is None else layer, part or ""))
    return found
