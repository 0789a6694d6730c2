"""The stages of `tasks/` by names that work from any folder: `pyinfra INVENTORY llamafleet.deploy` is the whole
`deploy.py`, `pyinfra INVENTORY llamafleet.stages.build` one stage.

In a checkout `llamafleet/data/stages/tasks` and `llamafleet/data/deploy` are links to them; an installed package has
copies there. So an installation does not take the name `tasks` from pyinfra projects that have such a folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_DATA = Path(__file__).resolve().parent / "data"
FOLDER = (_DATA / "stages" / "tasks").resolve().parent  # the folder that has `tasks`
STORY = (_DATA / "deploy").resolve()


def __getattr__(name: str) -> Callable[..., Any]:
    """The stage of this name. Raises `AttributeError` with the names that there are, and `ImportError` where another
    package has the name `tasks`."""
    names = sorted(path.stem for path in (FOLDER / "tasks").glob("[a-z]*.py"))
    if name not in names:
        raise AttributeError(f"llamafleet.stages has no stage {name!r}: the stages are {', '.join(names)}")
    load()
    stage: Callable[..., Any] = getattr(importlib.import_module(f"tasks.{name}"), name)
    return stage


def deploy() -> None:
    """Run all stages in the order of `deploy.py` on the current host."""
    load()
    code = compile(STORY.read_text(encoding="utf-8"), str(STORY), "exec")
    exec(code, {"__name__": "deploy", "__file__": str(STORY)})  # noqa: S102 -- our own file


def load() -> None:
    """Import our `tasks`, whatever folder of that name is found first from here; what is printed is cleaned from then
    on. Raises `ImportError`."""
    if "tasks" not in sys.modules:
        spec = PathFinder.find_spec("tasks", [str(FOLDER)])
        if spec is None or spec.loader is None:
            raise ImportError(f"{FOLDER / 'tasks'}: the stages are missing from this installation: install it again")
        package = importlib.util.module_from_spec(spec)
        sys.modules["tasks"] = package
        spec.loader.exec_module(package)
    found = [Path(folder).resolve() for folder in sys.modules["tasks"].__path__]
    if found != [FOLDER / "tasks"]:
        raise ImportError(
            f"another package has the name tasks already ({', '.join(map(str, found))}): "
            "run llamafleet's stages in a pyinfra run of their own"
        )
    importlib.import_module("tasks.lib")
