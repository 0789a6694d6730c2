"""The import rules that import-linter cannot see: neighbours imported by bare name, and folders that are no packages.

The others are contracts in pyproject.toml; `make check` runs them. Why programs of the hosts import so little:
docs/decisions/0014-hosts-need-no-python-packages.md.
"""

import ast
import sys
from pathlib import Path

import pytest

from llamafleet import payload

ROOT = Path(__file__).resolve().parents[1]
STANDARD = set(sys.stdlib_module_names)


def imported(path):
    """Every module that a file imports, anywhere in it; a relative import as "." and its name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def unlisted(path, allowed):
    """What a file imports that is neither of the standard library nor a module in `allowed`, or inside one."""
    names = {name for name in imported(path) if name.partition(".")[0] not in STANDARD}
    return {name for name in names if not any(name == module or name.startswith(f"{module}.") for module in allowed)}


def files(pattern):
    found = sorted(ROOT.glob(pattern))
    assert found, f"no file at {pattern}: the rule would hold nothing"
    return found


def stems(pattern):
    return {path.stem for path in files(pattern)}


# What the files of a folder may import besides the standard library.
ALLOWED = {
    "llamafleet/remote/*.py": {"psutil", "pynvml"} | stems("llamafleet/remote/*.py"),
    "inventory/local.py": set(),
    "inventory/fleet.example.py": set(),
    "inventory/group_data/*.py": set(),
    "inventory/sandbox.py": {"sandbox"},
    "deploy.py": {"llamafleet.stages"},
    "config.py": {"tasks"},
    # What checks a host must not use what changed it.
    "tests/hosts/*.py": {
        "tests.hosts",
        "llamafleet",
        "pytest",
        "testinfra",
        "pyinfra",
        "pyinfra_cli",
        "gevent",
        "pydantic",
        "typing_extensions",
    },
    # Model files are written with the reference package, as anybody would.
    "sandbox/*.py": {"sandbox", "gguf", "numpy", "yaml"},
}


@pytest.mark.parametrize(
    ("path", "allowed"),
    [pytest.param(path, allowed, id=str(path.relative_to(ROOT)).replace("/", "-"))
     for pattern, allowed in ALLOWED.items() for path in files(pattern)],
)  # fmt: skip
def test_a_file_imports_only_what_its_folder_may(path, allowed):
    assert unlisted(path, allowed) == set()


@pytest.mark.parametrize("name", payload.PROBE_PROGRAMS)
def test_what_a_probe_program_imports_is_sent_with_it(name):
    sent = {Path(program).stem for program in payload.PROBE_PROGRAMS}
    assert unlisted(ROOT / "llamafleet/remote" / name, sent | {"psutil", "pynvml"}) == set()
