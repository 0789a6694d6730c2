"""The import rules of the folders: who decides, who acts, what runs elsewhere."""

import ast
import sys
from pathlib import Path

import pytest

from llamafleet import payload

ROOT = Path(__file__).resolve().parent.parent
STANDARD = set(sys.stdlib_module_names)
# Module of ours: what it may import of ours, in the design's order.
ORDER = [
    "extra",
    "settings",
    "machine",
    "gguf_cursor",
    "hyperparameters",
    "gguf",
    "kv",
    "checkpoints",
    "graphs.positions",
    "graphs.features",
    "graphs.ggml",
    "graphs.builder",
    "graphs.recurrent",
    "graphs.rwkv",
    "graphs.experts",
    "graphs.gemma",
    "graphs.attention",
    "graphs.blocks",
    "graphs.scheduling",
    "bound",
    "compute",
    "weights",
    "ledger",
    "adjust",
    "catalogue",
    "workload",
    "rates",
    "predict",
    "place",
    "sketch",
    "budgets",
    "choose",
    "settle",
    "processors",
    "reasons",
    "answer",
    "backend",
    "plan",
    "flags",
    "verified",
    "keep",
]

STAGES = ["bootstrap", "toolkit", "build", "model", "plan", "verify", "service", "uninstall"]


def imports(path):
    """Every module that a file imports, relative ones resolved within `llamafleet`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            package = ["llamafleet", *(["graphs"] if path.parent.name == "graphs" else [])]
            above = ".".join(package[: len(package) + 1 - node.level])
            yield from (f"{above}.{name}" for name in names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "llamafleet":
                yield from (f"llamafleet.{alias.name}" for alias in node.names)
            else:
                yield node.module


def roots(path):
    return {name.split(".")[0] for name in imports(path)}


def files(folder, deep=False):
    return sorted((ROOT / folder).glob("**/*.py" if deep else "*.py"))


@pytest.mark.parametrize("path", files("llamafleet") + files("llamafleet/graphs"), ids=lambda path: path.name)
def test_what_decides_needs_no_host(path):
    assert not roots(path) & {"pyinfra", "jinja2", "tasks", "sandbox", "tests", "gevent"}
    if path.name not in ("payload.py", "cli.py"):  # the thin edge: pip for the wheels, the command line
        assert "subprocess" not in roots(path)


@pytest.mark.parametrize("name", ORDER)
def test_what_decides_imports_downwards_only(name):
    later = {f"llamafleet.{other}" for other in ORDER[ORDER.index(name) + 1 :]}
    assert not later & set(imports(ROOT / "llamafleet" / f"{name.replace('.', '/')}.py"))


@pytest.mark.parametrize("path", files("llamafleet/remote"), ids=lambda path: path.name)
def test_what_runs_on_hosts_brings_nothing_of_ours(path):
    siblings = {one.stem for one in files("llamafleet/remote")}
    assert roots(path) - STANDARD <= {"psutil", "pynvml", "requests"} | siblings


@pytest.mark.parametrize("name", payload.PROBE_PROGRAMS)
def test_what_the_probe_imports_is_sent_with_it(name):
    siblings = {one.stem for one in files("llamafleet/remote")}
    sent = {Path(one).stem for one in payload.PROBE_PROGRAMS}
    assert roots(ROOT / "llamafleet/remote" / name) & siblings <= sent


@pytest.mark.parametrize("path", files("inventory", deep=True), ids=lambda path: path.name)
def test_inventories_stand_alone(path):
    allowed = {"sandbox"} if path.name == "sandbox.py" else set()
    assert roots(path) - STANDARD <= allowed


@pytest.mark.parametrize("path", files("tests/hosts"), ids=lambda path: path.name)
def test_checks_do_not_use_what_made_the_change(path):
    assert "tasks" not in roots(path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_never_imports_a_stage(stage):
    path = ROOT / f"tasks/{stage}.py"
    others = {f"tasks.{other}" for other in STAGES if other != stage}
    found = set(imports(path)) | {f"tasks.{name}" for name in _names_from_tasks(path)}
    assert not others & found


def _names_from_tasks(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tasks":
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", files("sandbox"), ids=lambda path: path.name)
def test_sandbox_needs_only_python(path):
    # These write GGUF files with the reference package, as anybody would.
    more = {"models.py": {"gguf", "numpy"}, "quants.py": {"gguf", "numpy"}, "outlines.py": {"gguf", "yaml"}}
    assert roots(path) - STANDARD <= {"sandbox"} | more.get(path.name, set())
