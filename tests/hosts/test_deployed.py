"""Is what runs what was planned? One test for each question, asked of every host or instance."""

from __future__ import annotations

import functools
import os
import subprocess

import pytest

from tests.hosts import checks, instance_checks


def good(problems: checks.Problems) -> None:
    """Fail with everything that is wrong, in words; no value is printed that a check does not name."""
    found = [str(problem) for problem in problems]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@functools.cache
def commit_of(repository: str, ref: str) -> str | None:
    """The commit that a repository's tag or branch names; None where it cannot be asked."""
    names = [f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}", f"refs/heads/{ref}"]
    done = subprocess.run(
        ["git", "ls-remote", repository, *names],
        capture_output=True, text=True, timeout=60, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
    )  # fmt: skip
    found = {name: sha for sha, name in (line.split("\t") for line in done.stdout.splitlines())}
    return next((found[name] for name in names if name in found), None)


def test_release(box: checks.Box) -> None:
    good(checks.release(box, commit_of))


def test_version(box: checks.Box) -> None:
    good(checks.version(box))


def test_folders(box: checks.Box) -> None:
    good(checks.folders(box))


def test_leftovers(box: checks.Box) -> None:
    good(checks.leftovers(box))


def test_undeclared_units(box: checks.Box) -> None:
    good(checks.undeclared(box))


def test_plan(served: checks.Served) -> None:
    good(instance_checks.plan_file(served))


def test_models(served: checks.Served) -> None:
    good(instance_checks.models(served))


def test_unit(served: checks.Served) -> None:
    good(instance_checks.unit(served))


def test_running(served: checks.Served) -> None:
    good(instance_checks.running(served))


def test_process(served: checks.Served) -> None:
    good(instance_checks.process(served))


def test_sandbox(served: checks.Served) -> None:
    good(instance_checks.sandbox(served))


def test_origins(served: checks.Served) -> None:
    good(instance_checks.origins(served))


def test_listening(served: checks.Served) -> None:
    good(instance_checks.listening(served))


def test_keys(served: checks.Served) -> None:
    good(instance_checks.keys(served))


def test_liveness(served: checks.Served) -> None:
    good(instance_checks.liveness(served))


@pytest.mark.parametrize("name", instance_checks.GATE_CHECKS, ids=lambda name: name.replace(" ", "-"))
def test_gate(served: checks.Served, name: str) -> None:
    """The gate that let the instance in, asked again: health, arguments, GPU memory, key, context, reply, speed."""
    if name not in instance_checks.planned_gate_checks(served):
        pytest.skip("the plan uses no GPU" if name == "gpu memory" else "no API key is asked for")
    good(instance_checks.gate(served, name))
