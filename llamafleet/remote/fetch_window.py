"""Which piece of a file which source brings next.

Part of fetch.py and under its contract: Python 3.8, standard library, what lies beside it. No effects and no clock of
its own.

Pieces leave in order. Only a window of pieces from the first missing one is under way, which bounds what is in memory.
Each source takes a piece when it has brought its last one: so each brings as many as it can. A piece that is under way
for long, while a source has nothing else to do, is given to that one as well; whoever brings it first has brought it.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple

# Seconds after which a piece is given to a second source that has nothing else to do.
LATE_S = 2.0
# Pieces in the window for each source.
AHEAD = 2


class Window:
    """Pieces from `first` up to `count`, of which at most AHEAD for each of `sources` sources are in memory."""

    def __init__(self, first: int, count: int, sources: int) -> None:
        self.first, self.count, self.most = first, count, AHEAD * max(1, sources)
        self._brought: Dict[int, bytes] = {}
        self._under_way: Dict[int, Dict[str, float]] = {}  # by piece: since when, by source

    def is_done(self) -> bool:
        return self.first >= self.count

    def take(self, source: str, now: float) -> Optional[int]:
        """The piece that this source brings next; None: nothing at the moment."""
        late = None
        for piece in range(self.first, min(self.first + self.most, self.count)):
            if piece in self._brought:
                continue
            takers = self._under_way.setdefault(piece, {})
            if not takers:
                takers[source] = now
                return piece
            if late is None and source not in takers and len(takers) < 2 and now - min(takers.values()) >= LATE_S:
                late = piece
        if late is not None:
            self._under_way[late][source] = now
        return late

    def is_wanted(self, piece: int) -> bool:
        """Whether it was brought by nobody yet."""
        return piece >= self.first and piece not in self._brought

    def give_back(self, source: str, piece: int) -> None:
        """The source does not bring it."""
        self._under_way.get(piece, {}).pop(source, None)

    def bring(self, piece: int, data: bytes) -> None:
        """A source has brought it, checked."""
        if self.is_wanted(piece):
            self._brought[piece] = data
            self._under_way.pop(piece, None)

    def leave(self) -> List[Tuple[int, bytes]]:
        """The pieces that can be written now, in order; they are no longer kept."""
        ready = []
        while self.first in self._brought:
            ready.append((self.first, self._brought.pop(self.first)))
            self.first += 1
        return ready
