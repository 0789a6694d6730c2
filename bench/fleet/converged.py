"""What the programs on a host print where everything is as a run wants it, for any machine and any models.

The frame was recorded on a real host (bench/data/converged-host.json). What depends on machine, plan and build is
decided here by the same functions as in a run, and written as the host would have it: so the hosts are converged for
whatever this checkout plans. `Converged` refuses a host of which a run would change something.
"""

from __future__ import annotations

import copy
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamafleet import payload
from llamafleet.cli.arguments import default_data
from llamafleet.host import answers, described
from llamafleet.hub.source import ModelFiles
from llamafleet.memory.placement import HOST
from llamafleet.planner.reconcile import Verified
from llamafleet.planner.result import Plan
from llamafleet.remote.common import BUILD, CURRENT, GATE_SCHEMA, HELPERS, RELEASES, SOURCE, core_of_unit, helper
from llamafleet.service import disks, wanted
from llamafleet.service.building import Run
from llamafleet.service.changes import changes_needed
from llamafleet.service.desired import Desired, Serving, desire, with_plans
from llamafleet.service.model_folders import model_path
from llamafleet.service.plan_inputs import PlanInputs, plan_inputs
from llamafleet.settings.schema import Settings
from tasks.lib import lookups, templates

RECORDED = json.loads((Path(__file__).resolve().parent.parent / "data" / "converged-host.json").read_text())
DRIVER = {"nvidia": "580.159.04", "cuda": "13.0"}
TOOLKIT = {
    "path": "/usr/local/cuda-13.0", "nvcc": "/usr/local/cuda-13.0/bin/nvcc", "version": "13.0", "headers": True,
    "cudart": True, "cublas": True, "driver_stub": True, "host_compiler": None, "accepted_compiler": None,
    "problems": [], "aliases": ["/usr/local/cuda"], "distro": False, "gcc_limit": 15, "build": "13.0.88",
}  # fmt: skip
PID = 1234
PROBED_BYTES_PER_S = 50e9
TIME = "2026-11-30T08:13:37Z"
_ROUNDS = 3  # until what the host has and what is decided from that agree


class Converged:
    """A host by its machine in words (see llamafleet/host/described.py) and its settings, as an inventory gives them.

    `commit` is llama.cpp's, of which the host has a release. Raises `ValueError` with what a run would change.
    """

    def __init__(self, name: str, machine: str, data: Mapping[str, Any], commit: str) -> None:
        self.settings = Settings.from_data({**default_data(), **data})
        self._machine, self._found = _machine(name, machine), _found()
        # No two hosts measure the same.
        self._luck = 0.95 + 0.1 * int(_sha256(name)[:8], 16) / 2**32
        self._found["bandwidth"] = {
            "bytes_per_s": round(PROBED_BYTES_PER_S * self._luck), "core_steps_per_s": None, "hardware": machine,
            "why": "",
        }  # fmt: skip
        if self._machine["gpus"]:
            self._found |= {"toolkits": [TOOLKIT], "nvidia_minors": _minors(self._machine["gpus"])}
            self._found["ground"]["driver"] = DRIVER["nvidia"]
        self._models = {one.name: lookups.model(one, self.settings) for one in self.settings.models}
        self._run = Run(payload.helpers_key(), payload.HELPERS_PYTHON, commit, {}, None)
        differing: tuple[object, ...] = ()
        for _ in range(_ROUNDS):
            desired = self._desired()
            changes = changes_needed(desired, desired.installed)
            differing = (*changes.of_host(), *changes.services.items(), *changes.refreshed.items(),
                         *changes.liveness.items(), *changes.paths, *changes.removed, *changes.note)  # fmt: skip
            if not differing:
                break
            self._install(desired)
        if differing:
            raise ValueError(f"{name}: a run would change {differing}")
        self._prints = {
            "survey.py": json.dumps({"machine": self._machine, "found": self._found}) + "\n",
            "status.py": json.dumps({serving.name: _live(serving) for serving in desired.servings}) + "\n",
        }

    def __call__(self, words: list[str]) -> str | None:
        """What the host prints at this command; None where it would change something, or is none of these programs."""
        if "survey.py" in words and f"{HELPERS}/{self._run.helpers}" in words:
            return self._prints["survey.py"]
        return self._prints["status.py"] if words[-1] == helper("status.py") else None

    def _desired(self) -> Desired:
        read = answers.survey(json.dumps({"machine": self._machine, "found": self._found}))
        inputs = plan_inputs(self.settings, read, self._models)
        if not isinstance(inputs, PlanInputs):
            raise ValueError(str(inputs))
        desired = desire(inputs, self._run, templates.render)
        if not isinstance(desired, Desired):
            raise ValueError(str(desired))
        # As where llama-server was asked about every plan, and agreed.
        choice = inputs.keep_or_replan(inputs.corrections())
        told = {one.instance: _verified(one) for one in choice.results if isinstance(one, Plan)}
        asked = with_plans(desired, choice, inputs.corrections(), told, templates.render)
        known = all(serving.is_verified for serving in desired.servings)
        return desired if known or not isinstance(asked, Desired) else asked

    def _gated(self, serving: Serving) -> dict[str, Any]:
        """The speeds that the gates of the instance have measured, as learned.py reports them."""
        expected = serving.record["plan"]["expected"]
        speeds = {key: expected[key] * self._luck for key in ("decode_tokens_per_s", "prompt_tokens_per_s")}
        return {"instance": serving.name, **speeds, "expected": expected}

    def _install(self, desired: Desired) -> None:
        """Write what the host should be as what it has."""
        release = _release(desired)
        files = {f"{serving.folder}/{file.name}": file for serving in desired.servings for file in serving.model.files}
        self._found |= {
            "helpers": self._run.helpers, "current": desired.build.key, "releases": {desired.build.key: release},
            "release_digests": {desired.build.key: _sha256(json.dumps(release))},
            "models": {path: {"size_bytes": file.size_bytes, "sha256": file.sha256} for path, file in files.items()},
            "instances": {serving.name: _instance(serving) for serving in desired.servings},
            "gate_speeds": [self._gated(serving) for serving in desired.servings],
            "gated": {serving.name: _speeds(serving) for serving in desired.servings},
            "left": _left(self.settings, {path: file.size_bytes for path, file in files.items()}),
            "paths": {place.path: _lies(place) for place in _places(desired, list(files))},
        }  # fmt: skip


def _machine(name: str, words: str) -> dict[str, Any]:
    """The machine file of a described machine, with the system of the recorded host."""
    told = described.read(words).machine
    gpus = tuple(replace(gpu, uuid=f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{name} {gpu.index}')}") for gpu in told.gpus)
    file = replace(told, gpus=gpus).to_json()
    return {**file, **copy.deepcopy(RECORDED["machine"]), "hostname": name, **({"driver": DRIVER} if gpus else {})}


def _found() -> dict[str, Any]:
    """A host on which nothing of ours is installed."""
    return {
        **copy.deepcopy(RECORDED["found"]), "lock": None, "jobs": [], "helpers": None, "current": None, "releases": {},
        "release_digests": {}, "cached_builds": {}, "models": {}, "instances": {}, "paths": {}, "unbindable": {},
        "bandwidth": None, "gate_speeds": [], "gated": {}, "left": {},
    }  # fmt: skip


def _minors(gpus: list[dict[str, Any]]) -> dict[str, int]:
    return {gpu["pci_bus_id"]: gpu["index"] for gpu in gpus}


def _verified(plan: Plan) -> Verified:
    """llama-server allocates what the ledger says."""
    sizes = {
        row.device: row.weights_bytes + row.kv_bytes + row.compute_bytes + row.staging_bytes
        + (plan.mapped_bytes if row.device == HOST else 0)
        for row in plan.ledger
    }  # fmt: skip
    return Verified(sizes, sizes)


def _release(desired: Desired) -> dict[str, Any]:
    """release.json of the wanted build."""
    build, recorded = desired.build, RECORDED["release"]
    return {
        "schema": 1, "key": build.key, "commit": build.commit, "backend": build.backend, "toolkit": build.toolkit,
        "architectures": list(build.architectures), "libc": build.libc, "ref": desired.settings.llama_cpp_ref,
        "repository": desired.settings.llama_cpp_repository, "built_on": desired.machine.hostname,
        "cmake_flags": list(build.cmake_flags()), "version": recorded["version"],
        "files": {name: _sha256(name) for name in recorded["files"]},
        "sizes": dict.fromkeys(recorded["files"], 1 << 20),
    }  # fmt: skip


def _instance(serving: Serving) -> dict[str, Any]:
    """An instance that was installed as planned, passed the gate, and runs."""
    service = serving.service
    unit, core = _sha256(service.unit_text), _sha256(core_of_unit(service.unit_text))
    plan, liveness = _sha256(service.plan_json), {name: _sha256(text) for name, text in service.liveness.items()}
    return {
        **copy.deepcopy(RECORDED["instance"]), "unit_sha256": unit, "unit_core_sha256": core, "good_sha256": unit,
        "good_core_sha256": core, "plan_sha256": plan, "good_plan_sha256": plan, "liveness_sha256": liveness,
        "good_liveness_sha256": liveness, "preflight": None, "pid": PID, "argv": list(service.argv),
        "exe": service.argv[0], "record": json.loads(service.plan_json),
    }  # fmt: skip


def _speeds(serving: Serving) -> dict[str, float]:
    predicted = serving.plan.predicted
    return {
        "decode_tokens_per_s": predicted.decode_tokens_per_s, "prompt_tokens_per_s": predicted.prefill_tokens_per_s,
    }  # fmt: skip


def _left(settings: Settings, files: Mapping[str, int | None]) -> dict[str, Any]:
    free = RECORDED["machine"]["disks"][0]["free_bytes"]
    spaces = {
        path: {"place": path, "device": "54", "free_bytes": free, "mount": "/", "unmounted": None, "read_only": False}
        for path in disks.paths(settings)
    }
    return {"reboot": "", "closed": {}, "spaces": spaces, "model_bytes": dict(files)}


def _places(desired: Desired, models: list[str]) -> Iterator[wanted.Place]:
    """Every place of ours; those that a host has only while it builds are missing."""
    instances = [wanted.Instance(one.name, (), bool(one.service.liveness)) for one in desired.servings]
    every = wanted.places(instances, desired.run.helpers, desired.build.key, RECORDED["release"]["files"], models)
    return (place for place in every if place.path not in (BUILD, SOURCE))


def _lies(place: wanted.Place) -> dict[str, Any]:
    kind = place.kind.split(" or ")[0]
    target = RELEASES if place.path == CURRENT else HELPERS
    return {"kind": kind, "mode": place.mode, "uid": 0, "gid": 0, "target": target if kind == "link" else None}


def _live(serving: Serving) -> dict[str, Any]:
    """What status.py says of the instance."""
    gate, argv = serving.record["gate"], list(serving.service.argv)
    process = {"name": "process", "ok": True, "expected": argv, "found": argv, "hint": ""}
    passed = {
        "ok": True, "checks": [*copy.deepcopy(RECORDED["checks"]), process], "schema": GATE_SCHEMA, "time": TIME,
        "identity": serving.service.identity, "release": serving.record["release"], **_speeds(serving),
    }  # fmt: skip
    held = {gpu["uuid"]: gpu["planned_bytes"] for gpu in gate["gpus"]}
    return {**RECORDED["status"], "gpu_bytes": held, "gate": passed}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["RECORDED", "Converged", "ModelFiles", "model_path"]
