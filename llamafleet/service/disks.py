"""Whether the disks of a host hold what a run brings, decided before anything is compiled or downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llamafleet.build.release import Build
from llamafleet.host.installed import Installed
from llamafleet.hub.source import ModelFiles
from llamafleet.remote.common import BUILD, MODELS, RELEASES
from llamafleet.service.changes import Changes
from llamafleet.service.desired import Desired
from llamafleet.service.model_folders import stored_at
from llamafleet.service.refusals import Refused
from llamafleet.settings.schema import Settings

GIB = 2**30
MIB = 2**20
# Stays free where models are downloaded, and where anything else is written.
MODEL_RESERVE_BYTES, RESERVE_BYTES = GIB, 64 * MIB
# What a build takes at the least, where nothing of it is there: its tree, then the release. The CPU's release has 50 MB
# (b11434); GPU backends add kernels, by GPU architecture and type of the KV cache. A host with more room than this may
# still run out of it; then the build says so.
TREE_BYTES = {"cpu": 60 * MIB, "vulkan": 100 * MIB, "hip": 500 * MIB, "cuda": 500 * MIB}
RELEASE_BYTES = {"cpu": 50 * MIB, "vulkan": 80 * MIB, "hip": 100 * MIB, "cuda": 100 * MIB}
# At the least: NVIDIA's compiler, headers and cuBLAS, unpacked and as they are downloaded; compilers and development
# files of the distribution.
TOOLKIT_BYTES, TOOLKIT_PACKED_BYTES, PACKAGES_BYTES = 3 * GIB, 2 * GIB, 100 * MIB
SYSTEM, PACKED = "/usr", "/var/cache"  # where packages are unpacked, and downloaded to


@dataclass(frozen=True)
class Need:
    """Bytes that a run writes below a path, and for what."""

    path: str
    what: str
    bytes: int
    reserve_bytes: int = RESERVE_BYTES


def paths(settings: Settings) -> tuple[str, ...]:
    """The places on a host that a run may fill."""
    other = (settings.models_dir, settings.build_cache)
    return tuple(dict.fromkeys((BUILD, RELEASES, SYSTEM, PACKED, MODELS, *(path for path in other if path))))


def models_path(settings: Settings) -> str:
    """Where models are downloaded to."""
    return settings.models_dir or MODELS


def needs(desired: Desired, changes: Changes) -> Iterator[Need]:
    """What this run writes on the host's disks, as far as its size is known."""
    installed, settings = desired.installed, desired.settings
    for folder, model in models(desired).items():
        store = stored_at(model, settings, installed)
        disk = MODELS if store is None else store.rpartition("/")[0]
        size = sum(missing_bytes(folder, model, installed)) if folder in changes.models else 0
        if size:
            yield Need(disk, f"the model {model.files[0].name}", size, MODEL_RESERVE_BYTES)
    if changes.build:
        yield from _of_build(desired.build, desired.is_cached, settings.build_cache)
    if changes.toolkit:
        yield Need(SYSTEM, "the CUDA toolkit", TOOLKIT_BYTES)
        yield Need(PACKED, "its packages", TOOLKIT_PACKED_BYTES)
    if changes.packages:
        yield Need(SYSTEM, "packages", PACKAGES_BYTES)


def _of_build(build: Build, is_cached: bool, cache: str | None) -> Iterator[Need]:
    if not is_cached:
        yield Need(BUILD, "compiling llama.cpp", TREE_BYTES[build.backend])
        if cache:
            yield Need(cache, "the build cache", RELEASE_BYTES[build.backend])
    yield Need(RELEASES, "the release of llama.cpp", RELEASE_BYTES[build.backend])


def models(desired: Desired) -> dict[str, ModelFiles]:
    """All models of the host, what is loaded beside them too, by their folders there."""
    return {folder: model for serving in desired.servings for folder, model in serving.models.items()}


def missing_bytes(folder: str, model: ModelFiles, installed: Installed) -> Iterator[int]:
    """What is to be downloaded of each file that the host has not verified; a part of it may be there. A file of the
    host's own may take no space (a hard link): the download itself knows."""
    for file in model.files:
        path = f"{folder}/{file.name}"
        if path not in installed.models and file.size_bytes and file.place != "host":
            yield max(0, file.size_bytes - installed.left.model_bytes.get(path, 0))


def refusal(desired: Desired, changes: Changes) -> Refused | None:
    """Why the host's disks do not hold what this run brings; None where they do, or where it is not known."""
    spaces = desired.installed.left.spaces
    wanted = [need for need in needs(desired, changes) if need.path in spaces]
    reasons = [
        f"disks: {need.path}: nothing is mounted at {spaces[need.path].unmounted}, where /etc/fstab has a disk: mount "
        f"it (mount {spaces[need.path].unmounted}), or {need.what} would be written to another one"
        for need in wanted
        if spaces[need.path].unmounted
    ]
    for device in dict.fromkeys(spaces[need.path].device for need in wanted):
        reasons += _on_one_disk(desired, [need for need in wanted if spaces[need.path].device == device])
    return Refused(tuple(dict.fromkeys(reasons))) if reasons else None


def _on_one_disk(desired: Desired, wanted: list[Need]) -> Iterator[str]:
    space = desired.installed.left.spaces[wanted[0].path]
    if space.read_only:
        yield f"disks: the file system at {space.mount} is mounted read-only: see dmesg there, and mount it for writing"
        return
    reserve = max(need.reserve_bytes for need in wanted)
    needed = sum(need.bytes for need in wanted) + reserve
    if space.free_bytes >= needed:
        return
    parts = ", ".join(f"{need.what} {gib(need.bytes)} at {need.path}" for need in wanted)
    has_model = any(need.reserve_bytes == MODEL_RESERVE_BYTES for need in wanted)
    old = unused(desired)
    ways = [f"free {gib(needed - space.free_bytes)}"]
    ways += [f"no instance uses {', '.join(f'{path} ({gib(size)})' for path, size in old)}"] if old else []
    ways += ["or take a smaller quantisation, or a disk with more room (models_dir)"] if has_model else []
    yield (
        f"disks: {gib(space.free_bytes)} are free on the file system at {space.mount}, {gib(needed)} are needed "
        f"({parts}; {gib(reserve)} stay free): {'; '.join(ways)}"
    )


def unused(desired: Desired) -> list[tuple[str, int]]:
    """Folders of models that no instance of the inventory uses, with their bytes, the largest first."""
    used = models(desired)
    sizes: dict[str, int] = {}
    for path, size in desired.installed.left.model_bytes.items():
        folder = path.rpartition("/")[0]
        if folder not in used:
            sizes[folder] = sizes.get(folder, 0) + size
    return sorted(sizes.items(), key=lambda one: -one[1])


def gib(size: int) -> str:
    """The bytes in words."""
    return f"{size / GIB:.1f} GiB"
