"""Upper bound of the compute buffers of a projector whose graph is not built here: its widest tensors, held at once.

Decision 5: docs/decisions/0005-known-or-bound-never-guessed.md.
"""

from __future__ import annotations

import math

from llamafleet.memory.graph.tower import Picture
from llamafleet.model.projector import Encoder

F32 = 4
HIDDEN_STATES = 16  # held at once: residual, norms, projections
WIDEST_AT_ONCE = 6


def bound(encoder: Encoder, picture: Picture, *, flash_attention: bool) -> int:
    """Bytes of the compute buffer at most."""
    positions = picture.count * (picture.across if encoder.hears else picture.across * picture.down + 1)
    matrices = [tensor.shape for tensor in encoder.tensors if len(tensor.shape) in (2, 3)]
    widest = max((max(shape[:2]) for shape in matrices), default=0)
    row = positions * F32
    states = (HIDDEN_STATES * encoder.embedding + WIDEST_AT_ONCE * min(widest, 8 * encoder.embedding)) * row
    pixels = picture.across * picture.down * encoder.patch**2 * 3 * picture.count * F32
    kernels = [math.prod(tensor.shape[:3]) + tensor.shape[3] for tensor in encoder.tensors if len(tensor.shape) == 4]
    places = picture.across * picture.down // 4 if encoder.hears else positions
    seen = 2 * max(kernels, default=0) * places * F32
    mask = 2 * positions * positions * F32 if encoder.kind.windowed else 0
    scores = 0 if flash_attention and not encoder.hears else 3 * encoder.heads * positions * positions * F32
    return states + 4 * pixels + seen + mask + scores
