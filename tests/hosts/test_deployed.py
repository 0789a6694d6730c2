"""Compare deployed hosts with their inventory: one test for each check and host or instance."""

from __future__ import annotations

import functools
import os
import subprocess

import pytest

from llamafleet import causes
from tests.hosts import checks, instance_checks


def fail_on(problems: checks.Problems) -> None:
    """Fail with a line for each problem; pytest prints no other value."""
    lines = [str(problem) for problem in problems]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@functools.cache
def commit_of(repository: str, ref: str) -> str | None:
    """The commit of a repository's tag or branch; None if it has neither or cannot be reached."""
    names = [f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}", f"refs/heads/{ref}"]
    try:
        result = subprocess.run(
            ["git", "ls-remote", repository, *names],
            capture_output=True, text=True, timeout=60, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )  # fmt: skip
    except FileNotFoundError as error:
        pytest.fail(causes.of_local(str(error)), pytrace=False)
    commits = {name: sha for sha, name in (line.split("\t") for line in result.stdout.splitlines())}
    return next((commits[name] for name in names if name in commits), None)


def test_release(box: checks.Box) -> None:
    fail_on(checks.release(box, commit_of))


def test_version(box: checks.Box) -> None:
    fail_on(checks.version(box))


def test_folders(box: checks.Box) -> None:
    fail_on(checks.folders(box))


def test_helpers(box: checks.Box) -> None:
    fail_on(checks.helpers(box))


def test_leftovers(box: checks.Box) -> None:
    fail_on(checks.leftovers(box))


def test_undeclared_units(box: checks.Box) -> None:
    fail_on(checks.undeclared(box))


def test_plan(served: checks.Served) -> None:
    fail_on(instance_checks.plan_file(served))


def test_models(served: checks.Served) -> None:
    fail_on(instance_checks.models(served))


def test_unit(served: checks.Served) -> None:
    fail_on(instance_checks.unit(served))


def test_running(served: checks.Served) -> None:
    fail_on(instance_checks.running(served))


def test_process(served: checks.Served) -> None:
    fail_on(instance_checks.process(served))


def test_sandbox(served: checks.Served) -> None:  # the name stays: operators select tests by their ids
    fail_on(instance_checks.hardening(served))


def test_origins(served: checks.Served) -> None:
    fail_on(instance_checks.origins(served))


def test_listening(served: checks.Served) -> None:
    fail_on(instance_checks.listening(served))


def test_keys(served: checks.Served) -> None:
    fail_on(instance_checks.keys(served))


def test_liveness(served: checks.Served) -> None:
    fail_on(instance_checks.liveness(served))


@pytest.mark.parametrize("name", instance_checks.GATE_CHECKS, ids=lambda name: name.replace(" ", "-"))
def test_gate(served: checks.Served, name: str) -> None:
    """The gate's checks, run again: health, arguments, GPU memory, key, context, answers, speed."""
    if served.is_stopped:
        pytest.skip("the model starts on demand, and nobody uses it now")
    if name not in instance_checks.planned_gate_checks(served):
        pytest.skip(instance_checks.NOT_PLANNED[name])
    if before := instance_checks.reported_at(served, name):
        pytest.skip(f"not reached: see gate: {before}")
    fail_on(instance_checks.gate(served, name))
