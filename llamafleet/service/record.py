"""plan.json: the record beside an installed unit of what was decided, what the gate checks, and what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from llamafleet.build.release import MIB, Build
from llamafleet.host.machine import Gpu
from llamafleet.hub.source import ModelFiles
from llamafleet.model import projector
from llamafleet.planner.flags import device_names
from llamafleet.planner.result import Plan
from llamafleet.remote.common import (
    API_KEYS,
    INSTANCES,
    PLAN_SCHEMA,
    TEXTS,
    TLS_CERTIFICATE,
    TLS_KEY,
    identity_of,
    server_socket,
    sha256,
)
from llamafleet.service.model_folders import companion_paths, model_folder
from llamafleet.service.speculation import guessing
from llamafleet.service.trial import told_to_host
from llamafleet.settings.companions import PROJECTOR, adapter
from llamafleet.settings.prompt_files import SETTINGS, as_served
from llamafleet.settings.schema import DEMAND, Instance
from llamafleet.settings.speculation import GUESSES_NOTHING

# Nobody serves from a slower disk; bytes per second. The gate measures the disk, and waits less.
SLOWEST_LOAD = 10 * MIB
# Before a server answers: start, warm-up, GPU initialisation, seconds.
START_SECONDS = 60
SHORT_COMMIT = 7  # digits, as git shows a commit


def plan_record(
    instance: Instance, plan: Plan, build: Build, model: ModelFiles, path: str, argv: tuple[str, ...],
    *, speed_floor_percent: int, alone: bool, environment: Mapping[str, str] = MappingProxyType({}),
    texts: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """plan.json, without `inputs` and `verified`, which make no difference to the running service.

    `path` is the model's first file on the host, `argv` the whole command line. `identity` is a hash of everything that
    makes a difference to the running service. The free bytes of the ledger, which drift from run to run, do not; nor
    does a sha256 that became known of a file that is served already. `alone`: the host is to have this instance and no
    other. `environment` are the operator's variables, `texts` the instance's credentials by name, of which those that
    are no secrets are in the record by their sha256.
    """
    paths = companion_paths(model)
    gate: dict[str, Any] = {
        "unit": instance.unit,
        "argv": list(argv),
        "url": f"{'https' if instance.tls_certificate_file else 'http'}://{url_host(instance.listen)}:{instance.port}",
        "api_keys": credentials(instance).get(API_KEYS),
        "tls_certificate": credentials(instance).get(TLS_CERTIFICATE),
        "health_seconds": health_seconds(model),
        "context_tokens": plan.context_tokens,
        "slots": plan.slots,
        "kv_type": plan.kv_type,
        "speed_floor_percent": speed_floor_percent,
        "backend": build.backend,
        "gpus": [
            {"uuid": gpu.uuid, "name": gpu.name, "device": device, **_planned(plan, gpu)}
            for gpu, device in zip(plan.gpus, device_names(plan.backend, len(plan.gpus)), strict=True)
        ],
        **_vectors(instance, plan),
    }
    if PROJECTOR in model.companions:
        gate |= _of_projector(instance, model.companions[PROJECTOR])
    if prompt_files := {name: _sums(name, texts[name]) for name in TEXTS if name in texts}:
        gate["prompt_files"] = prompt_files
    if instance.speculation not in GUESSES_NOTHING:
        gate["speculation"] = guessing(instance.speculation, argv)
    if instance.adapters:
        numbered = enumerate(instance.adapters, 1)
        gate["adapters"] = [{"path": paths[adapter(number)], "scale": one.scale} for number, one in numbered]
    folders = [path.rsplit("/", 1)[0], *(model_folder(one) for one in model.companions.values())]
    if instance.start == DEMAND:
        gate["socket"] = server_socket(instance.name)
    files = [{"path": f"{folder}/{name}", "size_bytes": size, "sha256": sha256}
             for folder, one in zip(folders, model.every, strict=True)
             for name, size, sha256 in one.recorded]  # fmt: skip
    record = {
        "schema": PLAN_SCHEMA,
        "name": instance.name,
        "source": instance.source,
        "release": build.key,
        "commit": build.commit,
        "backend": build.backend,
        "files": files,
        "gate": gate,
        "cpus": plan.cpus,
        "numa_nodes": plan.numa_nodes,
    }
    if environment:  # a record without has the identity that it had before there were any
        record["environment"] = dict(environment)
    identity = identity_of(record)
    public = without_query(instance.source)
    if public != instance.source:
        record["source"] = public
        record["public_identity"] = identity_of(record)
    told = {**told_to_host(argv, alone), "allowed_drop_ins": list(instance.allowed_drop_ins)}
    demand = {"demand": plan.demand.to_json()} if plan.demand else {}
    return {**record, "identity": identity, **told, **demand, "plan": chosen_plan(plan)}


def chosen_plan(plan: Plan) -> dict[str, Any]:
    """The plan as plan.json keeps it: with the speed that it was chosen for, which later gates do not change, and the
    speed that its own gate is expected to measure."""
    expected = plan.at_gate.to_json() if plan.at_gate else None
    told = {key: value for key, value in plan.to_json().items() if key != "problems"}  # those of the host, not its own
    return {**told, "predicted": plan.chosen_for.to_json(), "expected": expected}


def accepted(asked: str | None, ref: str, commit: str) -> dict[str, str]:
    """What plan.json says of `accept_slower`, outside of `identity`: this build's commit, if it is the one that is
    named, as in `llama_cpp_ref`, whole or by its first digits; else nothing."""
    named = asked is not None and (asked == ref or (len(asked) >= SHORT_COMMIT and commit.startswith(asked)))
    return {"accept_slower": commit} if named else {}


def without_query(source: str) -> str:
    """A model's source as plan.json has it: a query may be a signature, and everybody on the host may read that file.

    `public_identity` is then the hash of what the file has."""
    return source.partition("?")[0] if source.startswith(("http://", "https://")) else source


def _vectors(instance: Instance, plan: Plan) -> dict[str, Any]:
    """What the gate asks of a server of embeddings or scores; nothing for one that writes text, whose record then is
    that of versions which knew no other."""
    if instance.serves == "embedding":
        return {"serves": "embedding", "pooling": plan.pooling, "vector_elements": plan.vector_elements}
    if instance.serves == "reranking":
        example = instance.rerank_example
        return {"serves": "reranking", "rerank_example": asdict(example) if example else None}
    return {}


def record_text(record: dict[str, Any]) -> str:
    """The record as it is written on the host."""
    return json.dumps(record, indent=1) + "\n"


def health_seconds(model: ModelFiles) -> int:
    """The longest that an instance may load, from the size of its model; gate_load.py has the real deadline."""
    return START_SECONDS + model.bytes_total // SLOWEST_LOAD


def credentials(instance: Instance) -> dict[str, str]:
    """The unit's credentials by name: the file on the host that systemd loads each from, readable by root alone."""
    names = [API_KEYS] if instance.api_key_file else []
    names += [TLS_CERTIFICATE, TLS_KEY] if instance.tls_certificate_file else []
    names += [name for name, setting in SETTINGS.items() if getattr(instance, setting)]
    return {name: f"{INSTANCES}/{instance.name}/{name}" for name in names}


def url_host(address: str) -> str:
    """The address as part of a URL that reaches it from the host itself."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 -- compared with, never bound
    return f"[{reachable}]" if ":" in reachable else reachable


def _of_projector(instance: Instance, model: ModelFiles) -> dict[str, Any]:
    """What the gate asks of a projector, and how much longer the largest picture takes than the gate's."""
    found = projector.read(model.header, instance.image_min_tokens, instance.image_max_tokens)
    return {"modalities": list(found.modalities), "picture_ratio": round(found.largest_to_smallest, 1)}


def _sums(name: str, text: str) -> dict[str, str]:
    """Of a prompt file as it was sent, and as llama-server tells it."""
    return {"sha256": sha256(text.encode()), "served_sha256": sha256(as_served(name, text).encode())}


def _planned(plan: Plan, gpu: Gpu) -> dict[str, int]:
    """The bytes that llama.cpp itself allocates on a GPU, in total and by part. Its process must hold the total;
    staging buffers may count less."""
    row = next(row for row in plan.ledger if row.device == f"GPU{gpu.index}")
    parts = {name: getattr(row, name) for name in ("weights_bytes", "kv_bytes", "compute_bytes")}
    held = sum(parts.values()) + min(0, row.staging_bytes)
    beside = {"beside_bytes": row.beside_bytes} if row.beside_bytes else {}
    return {"planned_bytes": held + row.beside_bytes, **parts, "staging_bytes": row.staging_bytes, **beside}
