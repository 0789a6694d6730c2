"""Which device or the host holds each layer of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

HOST = "host"


@dataclass(frozen=True)
class Segment:
    """Layers lo to hi (hi excluded) on one device (None: the host). Layers keep to hi have experts (FFN) on the host.

    `part`: which tensors of layer `keep`'s experts (FFN) are on the host: "down"; "up" for up and gate; "" for all.
    """

    device: int | None  # llama.cpp's device number
    lo: int
    hi: int
    keep: int
    part: str = ""


@dataclass(frozen=True)
class Placement:
    """All layers of a model, in order, as segments. The last segment's device also holds the output."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(
        cls,
        layer_devices: Sequence[int | None],
        spilled: Collection[int] = (),
        partly: Mapping[int, str] | None = None,
    ) -> Placement:
        """Placement from a device for each layer and, last, for the output. `spilled`, `partly`: as the properties."""
        *devices, output = layer_devices
        parts = {**dict.fromkeys(spilled, ""), **(partly or {})}
        segments: list[Segment] = []
        for device, members in groupby(range(len(devices)), key=lambda layer: devices[layer]):
            segments += _segments(device, list(members), {} if device is None else parts)
        if not segments or segments[-1].device != output:
            segments.append(Segment(output, len(devices), len(devices), len(devices)))
        return cls(tuple(segments))

    @cached_property
    def layer_devices(self) -> tuple[int | None, ...]:
        """A device number for each layer and, last, for the output; None is the host."""
        devices = [segment.device for segment in self.segments for _ in range(segment.lo, segment.hi)]
        return (*devices, self.segments[-1].device)

    @cached_property
    def backends(self) -> tuple[int, ...]:
        """Backend numbers of ggml's scheduler for each layer and, last, the output; the host has the highest number."""
        host = len(self.devices)
        return tuple(host if device is None else device for device in self.layer_devices)

    @cached_property
    def moved(self) -> Mapping[int, str]:
        """Layers on a device with experts (FFN) on the host, by number: "all", or only "down" or "up"."""
        moved: dict[int, str] = {}
        for segment in self.segments:
            if segment.device is not None:
                moved |= dict.fromkeys(range(segment.keep, segment.hi), "all")
                if segment.part:
                    moved[segment.keep] = segment.part
        return moved

    @property
    def spilled(self) -> frozenset[int]:
        """Layers on a device with all their experts (FFN) on the host."""
        return frozenset(layer for layer, part in self.moved.items() if part == "all")

    @property
    def partly(self) -> tuple[tuple[int, str], ...]:
        """(layer, "down" or "up") for layers on a device with only that part of their experts (FFN) on the host."""
        return tuple(sorted((layer, part) for layer, part in self.moved.items() if part != "all"))

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """Numbers of the devices in use, in order."""
        return tuple(sorted({segment.device for segment in self.segments if segment.device is not None}))

    @property
    def gpu_layers(self) -> int:
        """Value of --n-gpu-layers: the layers on devices, where the output counts as a layer."""
        return sum(device is not None for device in self.layer_devices)

    @property
    def uses_host(self) -> bool:
        """Does the host hold any layer, the output, or experts (FFN) of a layer?"""
        return None in self.layer_devices or bool(self.moved)

    @property
    def is_pipeline(self) -> bool:
        """Do the devices compute several batches at once, as a pipeline (src/llama-context.cpp, llama_context)?"""
        return len(self.devices) > 1 and not self.uses_host

    def split(self) -> tuple[int, ...]:
        """Value of --tensor-split: the number of layers of each device in use; llama.cpp then assigns exactly these."""
        return tuple(self.layer_devices.count(device) for device in self.devices)

    def renumbered(self, numbers: Sequence[int]) -> Placement:
        """Placement with device N renumbered to `numbers[N]`; devices with equal numbers are merged."""
        return Placement(
            tuple(
                segment if segment.device is None else replace(segment, device=numbers[segment.device])
                for segment in self.segments
            )
        )


def _segments(device: int | None, members: Sequence[int], parts: Mapping[int, str]) -> list[Segment]:
    """Segments of consecutive layers on one device. `parts`: `Segment.part` of layers with experts (FFN) on the host.

    Within a segment, layers with experts on the host come last and only the first of them may be partial.
    """
    segments: list[Segment] = []
    for layer in members:
        last, part = (segments[-1] if segments else None), parts.get(layer)
        if part is None and last and last.keep == last.hi:
            segments[-1] = replace(last, hi=layer + 1, keep=layer + 1)
        elif part is not None and last and (last.keep == last.hi or not part):
            segments[-1] = replace(last, hi=layer + 1, keep=min(last.keep, layer), part=last.part or part)
        else:
            segments.append(Segment(device, layer, layer + 1, layer + 1 if part is None else layer, part or ""))
    return segments
