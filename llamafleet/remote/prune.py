"""Remove what earlier work has left and nobody needs any more.

Contract: a module, no program. `prune()` is called when a job starts. It removes logs, specifications and exit codes of
jobs that are older than KEPT_DAYS or not among the KEPT_JOBS newest of their kind, running jobs excepted; files that
were set aside as `.rejected`, older than KEPT_DAYS; records of the gate and of tunes for instances that are gone,
likewise; and what a run has left half done (staged files, which may hold keys, a preflight's model, and archives of
releases for other hosts), older than HALF_DONE_DAYS. What cannot be removed stays. Python 3.8, standard library;
common.py and pieces.py beside it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from typing import Dict, Iterator, List, Optional

from common import (
    ETC,
    GATES,
    GOOD,
    HELPERS,
    INSTANCES,
    JOBS,
    MODELS,
    OPT,
    PREFIX,
    RELEASES,
    STAGED,
    UNITS,
    VAR,
    listing,
    running_jobs,
    unit_of,
)
from pieces import BUILDS

KEPT_DAYS, KEPT_JOBS, HALF_DONE_DAYS = 30, 20, 1
DAY = 86400.0
JOB_FILES = (".log", ".exit", ".json")


def prune(now: Optional[float] = None) -> None:
    """Remove all of it; `now` is seconds since the epoch."""
    now = time.time() if now is None else now
    for path in itertools.chain(jobs(now), rejected(now), gates(now), tunes(now), half_done(now)):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)


def age_days(path: str, now: float) -> float:
    """Since its last change; 0 for what is gone."""
    try:
        return (now - os.lstat(path).st_mtime) / DAY
    except OSError:
        return 0.0


def jobs(now: float) -> Iterator[str]:
    """Files of jobs that ended long ago, or before many others of their kind."""
    running = running_jobs()
    by_kind: Dict[str, Dict[str, List[str]]] = {}
    for name in listing(JOBS):
        job, end = os.path.splitext(name)
        if end in JOB_FILES and job not in running:
            by_kind.setdefault(job.partition("-")[0], {}).setdefault(job, []).append(f"{JOBS}/{name}")
    for names in by_kind.values():
        ages = sorted((min(age_days(path, now) for path in paths), job) for job, paths in names.items())
        for place, (age, job) in enumerate(ages):
            if age > KEPT_DAYS or place >= KEPT_JOBS:
                yield from names[job]


def rejected(now: float) -> Iterator[str]:
    """Model files that were set aside because they were not the expected ones, and what lay in the way of our files."""
    below = [f"{folder}/{name}" for folder in (MODELS, INSTANCES, GOOD) for name in listing(folder)]
    for folder in (OPT, HELPERS, RELEASES, ETC, INSTANCES, VAR, GOOD, UNITS, *below):
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                is_ours = name.startswith(f".{PREFIX}" if folder == UNITS else ".") and name.endswith(".rejected")
                if is_ours and age_days(f"{folder}/{name}", now) > KEPT_DAYS:
                    yield f"{folder}/{name}"


def gates(now: float) -> Iterator[str]:
    """Records of the gate and of liveness checks, of instances that are neither installed nor kept."""
    paths = [f"{folder}/{name}" for folder in (GATES, f"{GATES}/liveness") for name in listing(folder)]
    for path in paths:
        # llamafleet 0.1.0 had NAME.liveness.json beside NAME.json. An instance may be called so, too.
        name = os.path.basename(path)[: -len(".json")]
        owners = {name, name[: -len(".liveness")] if name.endswith(".liveness") else name}
        if path.endswith(".json") and not any(map(is_there, owners)) and age_days(path, now) > KEPT_DAYS:
            yield path


def is_there(name: str) -> bool:
    """Whether an instance is installed, or its last good files are kept."""
    return os.path.exists(f"{UNITS}/{unit_of(name)}") or os.path.exists(f"{GOOD}/{name}")


def tunes(now: float) -> Iterator[str]:
    """Trials and records of tunes, of instances that are neither installed nor kept. A folder is as old as its last
    trial."""
    trials = [(name, f"{VAR}/tune/{name}", f"{VAR}/tune/{name}/trials.jsonl") for name in listing(f"{VAR}/tune")]
    records = [(name[: -len(".json")], path, path) for name in listing(f"{VAR}/tuned")
               if name.endswith(".json") and (path := f"{VAR}/tuned/{name}")]  # fmt: skip
    for name, path, dated in (*trials, *records):
        if not is_there(name) and age_days(dated if os.path.lexists(dated) else path, now) > KEPT_DAYS:
            yield path


def half_done(now: float) -> Iterator[str]:
    """What switches of runs that were killed would have used, and what other hosts have taken by now."""
    paths = [*(f"{STAGED}/{name}" for name in listing(STAGED)), *(f"{BUILDS}/{name}" for name in listing(BUILDS))]
    with contextlib.suppress(OSError):
        paths += [f"{MODELS}/{name}" for name in os.listdir(MODELS) if name.startswith(".preflight-")]
    return (path for path in paths if age_days(path, now) > HALF_DONE_DAYS)
