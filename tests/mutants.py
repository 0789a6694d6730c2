"""Broken answers of hosts by the thousand: faithful ones, changed at random places, and what our side makes of them.

A seed gives the same mutants everywhere. `tests/mutations.py` breaks data in fewer and shorter ways, for hypothesis.
"""

import copy
import json
import random
import re
from dataclasses import dataclass
from functools import cache
from unittest import mock

from llamafleet.cli import tables
from llamafleet.cli.fleet_status import page as table
from llamafleet.cli.report import page
from llamafleet.cli.reported import host_facts
from llamafleet.cli.status import Wanted, of_host
from llamafleet.cli.workload import HostWorkload, InstanceWorkload
from llamafleet.cli.workload import table as workload_table
from llamafleet.host import answers
from llamafleet.host.machine import MachineError
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.memory.ledger import NO_CORRECTION
from llamafleet.planner import reconcile
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan
from llamafleet.printable import finished, json_text
from llamafleet.remote.common import core_of_unit
from llamafleet.service import plan_inputs, wanted
from llamafleet.service.building import Run
from llamafleet.service.changes import changes_needed
from llamafleet.service.desired import desire
from llamafleet.service.instance_changes import sha256
from llamafleet.service.model_folders import model_path
from llamafleet.service.record import record_text
from llamafleet.service.refusals import Refused, held_by
from llamafleet.tuning.observed import fitting
from llamafleet.tuning.records import Kept
from tasks import uninstall
from tasks.lib import jobs, memory_check, remote, state
from tasks.lib.templates import render
from tasks.lib.this_run import is_ours_or_dead
from tests import planning
from tests.host.test_answers import ANSWERS, GATE
from tests.tasks.test_memory_check import Host
from tests.tuning.test_record import value

RUN = Run(helpers="h1", oldest_python=(3, 9), commit="c" * 40, secrets={"m0": {"api-keys": "secret\n"}}, holder=None)
GROUND = {"systemd": "257", "kernel": "6.12", "driver": "580.159.04"}
TOOLKIT = {
    "path": "/usr/local/cuda-12.8", "nvcc": "/usr/local/cuda-12.8/bin/nvcc", "version": "12.8", "headers": True,
    "cudart": True, "cublas": True, "driver_stub": True, "host_compiler": None, "accepted_compiler": None,
    "problems": [], "aliases": ["/usr/local/cuda"], "distro": False, "gcc_limit": 14, "build": "12.8.93",
}  # fmt: skip
BARE = {
    "euid": 0, "user": True, "missing_packages": ["cmake", "git"], "helpers": "h1", "lock": None, "jobs": ["build-0123456789abcdef"], "releases": {},
    "current": None, "cached_builds": {"0123456789abcdef": ["5e" * 32]}, "models": {}, "instances": {}, "listeners": [], "device_classes": ["nvidia"],
    "ground": GROUND, "gpu_groups": ["render", "video"], "foreign_units": [], "toolkits": [TOOLKIT], "release_digests": {},
    "compiler": "14.2.0", "tools": {"g++": "14.2.0", "cmake": "3.31.6"}, "rocm": [{"path": "/opt/rocm", "version": "6.3", "compiler": None, "hipblas": True, "rocblas": True}],
    "tuned": {"m0": value({"threads": 2})},
}  # fmt: skip
SYSTEM = {"package_manager": "apt", "python": "3.13.5", "disks": [{"path": "/opt", "free_bytes": 2**40}]}
AMD = {"vendor": "amd", "compute_capability": None, "gfx": "gfx1100", "name": "Radeon RX 7900 XTX"}


@dataclass(frozen=True)
class Box:
    """A host that is as it should be: what its survey prints, and what an operator asks of it."""

    settings: object
    models: dict
    survey: dict


def box(gpus, backend="auto", **machine):
    """A deployed host with these GPUs."""
    settings = planning.settings(
        {"source": "hf:a/b/m.gguf", "context_tokens": 8192, "api_key_file": "/keys"}, backend=backend
    )
    models = {
        "m0": ModelFiles((RemoteFile("m.gguf", "https://x/m.gguf", 5, "a" * 64),), planning.header("Llama-3.2-3B"))
    }
    found = {"machine": planning.machine(gpus, **SYSTEM, **machine).to_json(), "found": copy.deepcopy(BARE)}
    bare = Box(settings, models, found)
    desired = desire(inputs(bare, json.dumps(found)), RUN, render)
    [serving] = desired.servings
    unit, hashed = serving.service.unit, sha256(serving.service.unit_text)
    core = sha256(core_of_unit(serving.service.unit_text))
    paths = {place.path: {"kind": place.kind, "mode": place.mode, "uid": 0, "gid": 0} for place in wanted.folders()}
    found["found"] |= {
        "paths": {**paths, model_path(models["m0"]): {"kind": "file", "mode": 0o644, "uid": 0, "gid": 0}},
        "releases": {desired.build.key: {"files": {"llama-server": "5e" * 32}, "sizes": {"llama-server": 7}}},
        "current": desired.build.key, "missing_packages": [], "release_digests": {desired.build.key: "5e" * 32},
        "models": {model_path(models["m0"]): {"size_bytes": 5, "sha256": "a" * 64}},
        "listeners": [{"address": "127.0.0.1", "port": 9000, "pid": 7, "process": "llama-server", "unit": unit}],
        "instances": {"m0": {
            "unit_sha256": hashed, "plan_sha256": sha256(serving.service.plan_json), "good_sha256": hashed,
            "secrets": {name: sha256(text) for name, text in serving.service.secrets.items()}, "active": "active",
            "sub": "running", "enabled": "enabled", "restarts": 0, "drop_ins": [], "stale": False, "pid": 7,
            "argv": list(serving.service.argv), "exe": serving.service.argv[0], "liveness": "active",
            "liveness_sha256": {name: sha256(text) for name, text in serving.service.liveness.items()},
            "unit_core_sha256": core, "good_core_sha256": core,
            "good_plan_sha256": sha256(serving.service.plan_json), "good_is_whole": True, "unread_drop_ins": [],
            "good_liveness_sha256": {name: sha256(text) for name, text in serving.service.liveness.items()},
            "liveness_enabled": "enabled", "liveness_drop_ins": [], "deleted": [],
            "loaded": {name: sha256(text) for name, text in serving.service.secrets.items()},
            "preflight": {"rendered_sha256": hashed, "unit_sha256": hashed, "ground": GROUND, "dropped": []},
            "record": json.loads(serving.service.plan_json),
        }},
    }  # fmt: skip
    return bare


def inputs(host, line):
    """What plans are made from; raises `MachineError`."""
    return plan_inputs.plan_inputs(host.settings, answers.survey(line), host.models)


@cache
def boxes():
    return {
        "cuda": box([24564, {"used_by_others_mib": 512}]),
        "cpu": box([], "cpu", ram_gib=32),
        "hip": box([AMD]),
        "vulkan": box(
            [{**AMD, "vulkan_index": 0}],
            "vulkan",
            vulkan=[
                {
                    "index": 0,
                    "name": "AMD Radeon RX 7900 XTX (RADV NAVI31)",
                    "kind": "discrete",
                    "driver": "radv Mesa 25.0.7",
                    "uuid": "00000000-0300-0000-0000-000000000000",
                    "pci_bus_id": "0000:01:00.0",
                    "memory_total_bytes": 24564 * 2**20,
                },
            ],
        ),
    }


# --- what our side does with an answer ------------------------------------------------------------


def use_survey(host, line):
    """Decide, compare, and show: the deploy's table, `llamafleet plan --inventory`, `llamafleet status`
    and `llamafleet report`."""
    read = inputs(host, line)
    desired = read if isinstance(read, Refused) else desire(read, RUN, render)
    if isinstance(desired, Refused):
        shown = [str(desired)]
        wanted = None
    else:
        changes = changes_needed(desired, desired.installed)
        for serving in desired.servings:
            installed = desired.installed.instances.get(serving.name)
            kept = memory_check.kept_keys(installed) if installed else {}
            json.loads(record_text({**kept, **serving.record}))
        shown = [tables.table(serving.plan, "m0 on box") for serving in desired.servings]
        shown += [desired.why, json_text([serving.plan.to_json() for serving in desired.servings]), repr(changes)]
        wanted = state.wanted(desired, changes)
    told = answers.survey(line)
    status = of_host(told.installed, {}, wanted)
    shown += shown_status(status)
    shown.append(repr(page("box", {"box": host_facts("box", status, told, None, Kept())}, 0.0)))
    return "\n".join(shown)


def shown_status(state):
    shown = json_text({"box": state.to_json()})
    json.loads(shown)
    return [table({"box": state}), shown]


def use_status(host, line):
    live = answers.status(line)
    found = answers.survey(json.dumps(host.survey)).installed
    return "\n".join(shown_status(of_host(found, live, Wanted({"m0": ()}))))


def use_observed(host, line):
    found = {name: InstanceWorkload(one, fitting(one, 4)) for name, one in answers.observed(line).items()}
    shown = {"box": HostWorkload(found)}
    return "\n".join([workload_table(shown), json_text(shown["box"].to_json())])


def use_holder(host, line):
    holder = answers.holder(line)
    return f"{is_ours_or_dead(holder)} {held_by(holder)}"


def use_removable(host, line):
    found = answers.removable(line)
    try:
        uninstall._check(found)
    except remote.RemoteError as error:
        return str(error)
    return "\n".join([*found.units, *found.paths, *found.models])


def use_job(host, line):
    """What is logged of a job that has ended, or was seen in this state last."""
    log = Host()
    jobs.told(log, "build-key", answers.job(line))
    return "\n".join(["", *log.lines])


def use_gate(host, line):
    return repr(answers.gate(line))


def use_memory(host, line):
    told = answers.memory(line)
    return _planned_again(host, reconcile.MemoryReport(told.told, told.why, told.room))


def use_sizes(host, line):
    return _planned_again(host, reconcile.MemoryReport(answers.sizes(line)))


def _planned_again(host, report):
    """The plan with what llama-server would allocate, as after `verify` and in the switch."""
    read = inputs(host, json.dumps(host.survey))
    [plan] = read.keep_or_replan({}).results
    verified = reconcile.compare(plan, report)
    json.loads(record_text(verified.to_json()))
    [again] = read.keep_or_replan({"m0": NO_CORRECTION.plus(verified.differences)}).results
    limits = json.dumps(reconcile.memory_limits(again)) if isinstance(again, Plan) else ""
    return "\n".join([reconcile.summary("m0", verified), tables.table(again, "m0 on box"), limits])


# By name: the faithful answers, each with its host, and what our side does with one.
def seeds():
    hosts = boxes()
    faithful = {name: [(hosts["cuda"], value)] for name, (_, value) in ANSWERS.items()}
    faithful["survey"] = [(host, host.survey) for host in hosts.values()]
    faithful["status"] = [(hosts["cuda"], {"m0": {
        "rss_bytes": 5, "cgroup_bytes": 2**33, "gpu_bytes": {"GPU-0": 2**33, "GPU-1": None}, "since": "Sat", "gate": GATE,
    }})]  # fmt: skip
    return faithful


USES = {name.removeprefix("use_"): use for name, use in list(globals().items()) if name.startswith("use_")}


@cache
def _plan_host():
    """The planner, which is given the same machine again and again, with what it answered."""
    known = {}

    def plan(machine, requests, settings, corrections, measurements, later, companions):
        key = (machine, id(settings), repr(sorted(corrections.items())), repr(measurements), repr(later))
        if key not in known:
            known[key] = plan_host(machine, requests, settings, corrections, measurements, later, companions)
        return known[key]

    return plan


def use(name, host, line):
    """What our side shows of the answer; None where it was refused in one line. Everything else is a fault."""
    with mock.patch.object(plan_inputs, "plan_host", _plan_host()):
        try:
            shown = USES[name](host, line)
        except MachineError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 500, text
            return None
    clean = finished(shown)
    assert all(part.isprintable() for part in clean.split("\n"))
    return shown


# --- mutants --------------------------------------------------------------------------------------

# Texts that JSON writers do not write; they stand in the line in place of a word.
RAW = {
    "digits": "9" * 5000, "nan": "NaN", "infinity": "-Infinity", "huge": "1e999", "deep": "[" * 3000 + "]" * 3000,
    "deep object": '{"a":' * 200 + "1" + "}" * 200, "broken": '"\\u12"', "twice": '{"a": 1, "a": 2}', "minus": "-0", "octal": "007",
}  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 64, 255, 256, 1023, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 2**64 + 1, 10**30,
    -(2**63), 0.0, 0.5, -0.5, 1e-300, 1e300, 1e18, "", " ", "0", "-1", "1.5", "12.8", "0.0", "999999999.9", "8.9", "3.13.5",
    "2", "x", "-x", "--x", "../..", "/", "//", "a\nb", "a\x00b", "\x1b[2J\x9b31m", "\u202eevil", "\u2028", "\ud800", "\udcff",
    "\U000e0001", "é" * 50, "²", "٣", "x" * 5000, "x" * 70000, "0-3,8", "GPU-0", "GPU-9", "cuda", "nvidia", "amd", "intel", "vulkan",
    "software", "apt", "dnf", "aarch64", "riscv64", "debian", "rocky", "active", "m0", "llama-server-m0.service", "0.0.0.0", "::",
    "127.0.0.1", "5e" * 32, "a" * 64, [], [[]], [{}], [None], {}, {"": None}, {"a": {}}, ["x"] * 3000, [0] * 300, {"GPU-0": -1},
]  # fmt: skip
KEYS = [
    "",
    "schema",
    "m0",
    "m1",
    "GPU-0",
    "GPU-9",
    "host",
    "\ud800",
    "a\nb",
    "\x1b[2J",
    "k" * 5000,
    "..",
    "x",
    "/etc/passwd",
]


def _places(value, parents=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*parents, key)
        yield from _places(item, (*parents, key))


def _at(value, path):
    for step in path:
        value = value[step]
    return value


def mutant(seed, value):
    """The line of an answer with one to four changes, each at a random place."""
    draw = random.Random(seed)
    value, places = json.loads(json.dumps(value)), list(_places(value))
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        try:
            _change(draw, value, places)
        except (LookupError, TypeError, AttributeError):
            continue  # an earlier change took the place away
    line = json.dumps(value)
    line = re.sub(r'"@(\w[\w ]*)@"', lambda found: RAW.get(found[1], found[0]), line)
    return _cut(draw, line) if draw.random() < 0.1 else line


def _change(draw, value, places):
    *path, last = draw.choice(places)
    holder = _at(value, path)
    match draw.choice(("value", "value", "other", "other", "raw", "delete", "add", "copy", "number")):
        case "value":
            holder[last] = copy.deepcopy(draw.choice(VALUES))
        case "other":  # a value of this answer: often of the right type
            holder[last] = copy.deepcopy(_at(value, draw.choice(places)))
        case "raw":
            holder[last] = f"@{draw.choice(list(RAW))}@"
        case "delete":
            del holder[last]
        case "add" if isinstance(holder, dict):
            holder[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
        case "copy" if isinstance(holder, dict):
            holder[draw.choice(KEYS)] = copy.deepcopy(holder[last])
        case "add" | "copy":
            holder.append(copy.deepcopy(holder[last]))
        case "number" if type(holder[last]) in (int, float):
            holder[last] = int(holder[last] * draw.choice((0, 0.5, 0.99, 1.01, 2, 1000, -1))) + draw.randint(-2, 2)
        case "number":
            holder[last] = draw.randint(-5, 2**34)


def _cut(draw, line):
    """The line damaged as a text: cut, a part twice, a part away, another character, or no JSON at all."""
    start, end = sorted((draw.randint(0, len(line)), draw.randint(0, len(line))))
    odd = draw.choice(
        ("\x00", "\x1b[2J", "\ud800", "\udcff", "\u202e", "{", "}", "]", '"', "\\", ",", "é", "\ufeff", "9" * 5000)
    )
    return draw.choice((
        line[:end], line[start:], line[:start] + line[end:], line[:end] + line[start:], line[:start] + odd + line[start:],
        "Traceback (most recent call last):", "", "null", "[" * 100_000, line * 2,
    ))  # fmt: skip
