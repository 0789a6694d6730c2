"""Our operations, one situation a case file: tests/tasks/operations/MODULE.OPERATION/SITUATION.yaml."""

import types
from pathlib import Path

import pytest
from pyinfra_testing.operations import make_operation_tests

from tasks.lib import jobs, operations, remote
from tasks.lib.remote import RemoteError

CASES = Path(__file__).parent / "operations"

for folder in sorted(one.name for one in CASES.iterdir() if one.is_dir()):
    locals()[folder] = make_operation_tests("tasks.lib", folder, CASES / folder)


def commands(function, *arguments):
    """What pyinfra gets of a function that became an operation."""
    return list(operations.change(function)._inner(*arguments))


def test_before_its_first_command_an_operation_holds_the_lock_and_only_once():
    one, two = (remote.HostCommand([name], purpose=name) for name in ("one", "two"))
    hold, *rest = commands(lambda: iter([one, two]))
    assert hold.function.__wrapped__ is jobs.hold and rest == [one, two]


def test_an_operation_that_does_nothing_takes_no_lock():
    assert commands(lambda: iter([])) == []


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError("too deep"), RemoteError("the disk is full")])
def test_an_operation_that_raises_fails_its_host_with_one_line_and_nobody_else(error):
    """pyinfra would end the whole run."""
    lines = []
    host = types.SimpleNamespace(name="box1", log_styled=lambda text, **_: lines.append(text))

    def breaks():
        yield remote.HostCommand(["true"], purpose="true")
        raise error

    *_, last = commands(breaks)
    assert last.function(None, host, *last.args) is False
    assert lines == [str(error) if isinstance(error, RemoteError) else f"{type(error).__name__}: {error}"]
