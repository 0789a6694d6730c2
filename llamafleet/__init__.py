"""Load every box with exactly what it can carry."""

from __future__ import annotations

from collections.abc import Callable


def __getattr__(name: str) -> Callable[[], None]:
    """`deploy`, for `pyinfra INVENTORY llamafleet.deploy`; the stages are imported only where it is asked for."""
    if name != "deploy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llamafleet import stages

    stages.load()
    return stages.deploy
