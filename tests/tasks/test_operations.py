"""Our operations, one situation a case file: tests/tasks/operations/MODULE.OPERATION/SITUATION.yaml."""

from pathlib import Path

from pyinfra_testing.operations import make_operation_tests

CASES = Path(__file__).parent / "operations"

for folder in sorted(one.name for one in CASES.iterdir() if one.is_dir()):
    locals()[folder] = make_operation_tests("tasks.lib", folder, CASES / folder)
