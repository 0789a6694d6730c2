"""The default of every setting, from the file that travels with this package.

In a checkout that file is `inventory/group_data/all.py`, to which `llamafleet/data/defaults` is a link; an installed
package has a copy of it there. So an inventory may lie anywhere, and has the defaults without `group_data` beside it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "data" / "defaults"
MODEL_DEFAULTS = "model_defaults"


class DefaultsError(RuntimeError):
    """The file of the defaults cannot be read; the message names it and the way out."""


def defaults() -> dict[str, Any]:
    """The default of every setting by its key, those of a model in `model_defaults`. Raises `DefaultsError`."""
    return copy.deepcopy(_read())


def with_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """A host's data with the defaults of the keys that it lacks; in `model_defaults` too. Raises `DefaultsError`."""
    ours = defaults()
    merged = {**ours, **data}
    of_models = merged[MODEL_DEFAULTS]
    if isinstance(of_models, Mapping):
        merged[MODEL_DEFAULTS] = {**ours[MODEL_DEFAULTS], **of_models}
    return merged


@functools.cache
def _read() -> dict[str, Any]:
    try:
        text = FILE.read_text(encoding="utf-8")
    except OSError as error:
        raise DefaultsError(
            f"{FILE}: {error.strerror}: the defaults of the settings are missing from this installation; install "
            "llamafleet again (pip install --force-reinstall), or restore inventory/group_data/all.py of the checkout"
        ) from error
    values: dict[str, Any] = {}
    exec(compile(text, str(FILE.resolve()), "exec"), values)  # noqa: S102 -- our own file
    return {key: value for key, value in values.items() if not key.startswith("_")}
