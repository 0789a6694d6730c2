"""Where the files of a model lie on a host, and on which of its disks."""

from __future__ import annotations

from collections.abc import Iterator

from llamafleet.host.installed import Installed
from llamafleet.hub.source import ModelFiles
from llamafleet.remote.common import MODELS
from llamafleet.settings.schema import Settings


def model_folder(model: ModelFiles) -> str:
    """The model's folder on a host."""
    return f"{MODELS}/{model.folder}"


def stored_at(model: ModelFiles, settings: Settings, installed: Installed) -> str | None:
    """The folder on another disk to which the model's folder leads, or will; None where it lies there itself."""
    there = installed.paths.get(model_folder(model))
    if there is None or there.kind != "folder":
        return store_of(model, settings)
    return there.target if there.target and there.target.startswith("/") else None


def mount_of(store: str | None, installed: Installed) -> str | None:
    """Where the disk of that folder is mounted; None where that is the system's own disk, or not known."""
    mounts = {one.mount for one in installed.left.spaces.values() if store and store.startswith(f"{one.mount}/")}
    return max(mounts, key=len, default=None)


def store_of(model: ModelFiles, settings: Settings) -> str | None:
    """The folder for a model that is to be downloaded, where the settings name another one than the usual."""
    return f"{settings.models_dir}/{model.folder}" if settings.models_dir not in (None, MODELS) else None


def model_path(model: ModelFiles) -> str:
    """The model's first file on a host, which llama-server is given."""
    return f"{model_folder(model)}/{model.files[0].name}"


def companion_paths(model: ModelFiles) -> dict[str, str]:
    """The first file of each companion on a host, by its part."""
    return {role: model_path(companion) for role, companion in model.companions.items()}


def stores(model: ModelFiles, settings: Settings, installed: Installed) -> Iterator[str]:
    """The folders on other disks where files of the model and its companions lie, or will."""
    for one in model.every:
        if store := stored_at(one, settings, installed):
            yield store
