"""Bytes of a projector: its weights, and the compute buffers for the largest picture that it encodes at once.

llama-server reserves for a middling picture at its start and reports that much; its buffers grow with the first larger
one (tools/mtmd/clip.cpp: set_warmup_n_tokens, warmup, clip_encode). So a plan counts the largest, and what
llama-server reports is compared with the size at the start.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llamafleet.memory.graph.allocation import buffer_bytes
from llamafleet.memory.graph.builder import GraphUnknownError
from llamafleet.memory.graph.projectors import build
from llamafleet.memory.graph.tower import Picture
from llamafleet.memory.projector_bound import bound
from llamafleet.model.projector import Encoder, Projector
from llamafleet.units import MIB

BATCH_TOKENS = 1024  # common/common.h, mtmd_batch_max_tokens: pictures that are encoded together
# A picture as it was sent, decoded: 40 million pixels of three bytes, more than phones make.
SENT_PICTURE_BYTES = 120 * MIB
SOUND_BYTES = 32 * MIB  # half a minute of sound and its spectra
SOUND_POSITIONS = 1500  # of half a minute
WIDEST = 1 << 16  # elements of a row: bounds what a hostile header leads to
_UNKNOWN = (GraphUnknownError, LookupError, ArithmeticError, ValueError)


@dataclass(frozen=True)
class ProjectorBytes:
    """Bytes of a projector where its encoders are, and of the host beside them."""

    weights: int
    compute: int  # for the largest picture, where the encoders are
    host_compute: int  # ... and on the host, where they are on a GPU
    pictures: int  # of the host, for a picture on its way: no log counts them
    at_start: int  # what llama-server reports: weights and the compute buffers of its start, wherever they are
    scratch: int  # of a GPU's pools, which no log counts
    is_exact: bool  # False: compute is an upper bound

    @property
    def there(self) -> int:
        """Bytes where the encoders are."""
        return self.weights + self.compute + self.scratch

    @property
    def beside(self) -> int:
        """Bytes of the host where the encoders are on a GPU."""
        return self.host_compute + self.pictures


def projector_bytes(projector: Projector, *, on_gpu: bool, flash_attention: bool) -> ProjectorBytes:
    """What a projector takes, all its encoders together."""
    parts = [_of(one, projector.width, on_gpu, flash_attention) for one in projector.encoders]
    return ProjectorBytes(
        sum(part.weights for part in parts), sum(part.compute for part in parts),
        sum(part.host_compute for part in parts), sum(part.pictures for part in parts),
        sum(part.at_start for part in parts), sum(part.scratch for part in parts),
        all(part.is_exact for part in parts),
    )  # fmt: skip


def _of(encoder: Encoder, width: int, on_gpu: bool, flash: bool) -> ProjectorBytes:
    weights = sum(tensor.bytes for tensor in encoder.tensors)
    largest = [_compute(encoder, one, on_gpu, flash) for one in _largest(encoder)]
    first, _ = _compute(encoder, _at_start(encoder), on_gpu, flash)
    there = max(sizes[0] for sizes, _ in largest)
    host = max(sum(sizes[1:]) for sizes, _ in largest)
    return ProjectorBytes(
        weights, there, host, _pictures(encoder, width), weights + sum(first),
        _scratch(encoder) if on_gpu else 0, all(exact for _, exact in largest),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)  # the same pictures on every GPU, and with every setting that leaves them alike
def _compute(encoder: Encoder, picture: Picture, on_gpu: bool, flash: bool) -> tuple[tuple[int, ...], bool]:
    """Bytes of the compute buffer where the encoder is and, on a GPU, of the host's; and whether they are exact."""
    try:
        graph = build(encoder, picture, flash_attention=flash)
        return tuple(buffer_bytes(graph, 1 if on_gpu else 0)), True
    except _UNKNOWN:
        size = bound(encoder, picture, flash_attention=flash)
        return ((size, size // 4) if on_gpu else (size,)), False


def _at_start(encoder: Encoder) -> Picture:
    if encoder.hears:
        return Picture(encoder.warm_up_side, encoder.mel_bins)
    side = encoder.warm_up_side // encoder.patch
    return Picture(side, side)


def _largest(encoder: Encoder) -> Iterator[Picture]:
    """The picture of the start, the largest one, and as many of these as are encoded together."""
    yield _at_start(encoder)
    if encoder.hears:
        return
    tokens, merge = encoder.max_tokens, encoder.merge
    across = _near_square(tokens)
    if encoder.kind.tokens[1] or encoder.kind.has_pixel_keys or encoder.has_dynamic_size:
        largest = Picture(across * merge, tokens // across * merge)
    else:
        side = encoder.side // encoder.patch
        largest = Picture(side, side)
    yield largest
    if (count := _at_once(encoder)) > 1:
        yield replace(largest, count=count)


def _at_once(encoder: Encoder) -> int:
    """Pictures of the largest size that are encoded together: of a batch, or frames of a film."""
    return max(1, BATCH_TOKENS // encoder.max_tokens) if encoder.kind.batches else encoder.kind.frames


def _near_square(count: int) -> int:
    """The divisor of a number that is nearest to its square root."""
    return next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)


def _pictures(encoder: Encoder, width: int) -> int:
    """Bytes of the host for one picture: as it was sent, scaled, as numbers twice, and its embeddings."""
    if encoder.hears:
        return SOUND_BYTES
    pixels = encoder.max_tokens * (encoder.merge * encoder.patch) ** 2
    count = _at_once(encoder)
    return SENT_PICTURE_BYTES + count * (pixels * 3 * (1 + 4 + 4) + encoder.max_tokens * width * 4 * 2)


def _scratch(encoder: Encoder) -> int:
    """Bytes that a GPU's matrix product takes beside the buffers: its operands as 16 bit numbers.

    Source: ggml/src/ggml-cuda/ggml-cuda.cu, ggml_cuda_mul_mat_cublas_impl.
    """
    positions = SOUND_POSITIONS if encoder.hears else encoder.max_tokens * encoder.merge**2
    widest = max((max(tensor.shape[:2]) for tensor in encoder.tensors if len(tensor.shape) == 2), default=0)
    return 2 * 2 * positions * min(widest, WIDEST)
