"""plan.json as a host has it: values, or worth nothing, or of a later version by its number."""

import json

import pytest
from hypothesis import given

from llamafleet.host.recorded import PlanRecord
from tests.mutations import FUZZ, broken

MEMORY = {
    "host_bytes": 64 * 2**30,
    "swap_bytes": 0,
    "gpu_total_bytes": {"GPU-1": 24 * 2**30},
    "gpu_others_bytes": {"GPU-1": 5},
}
PLAN = {
    "schema": 1, "name": "demo", "source": "hf:a/b/c.gguf", "release": "k1", "commit": "c" * 40, "backend": "cuda",
    "files": [{"path": "/m", "size_bytes": 5, "sha256": None}], "cpus": "", "numa_nodes": "", "identity": "5e" * 8,
    "gate": {"unit": "llama-server-demo.service", "argv": ["llama-server"], "url": "http://127.0.0.1:8080", "api_keys": None,
             "health_seconds": 60, "context_tokens": 4096, "slots": 2,
             "gpus": [{"uuid": "GPU-1", "name": "x", "device": "CUDA0", "planned_bytes": 5}]},
    "trial": {"serve": []}, "batch_tokens": 512,
    "plan": {"argv": ["--fit", "off"], "ledger": [], "predicted": {"decode_tokens_per_s": 30}, "why": []},
    "inputs": {"key": "0123456789abcdef", "memory": MEMORY},
    "verified": {"ledger_bytes": {"GPU0": 5}, "binary_bytes": {"GPU0": 6}, "extra_bytes": {"GPU0": -1}, "rounds": 1, "why": ""},
}  # fmt: skip


def test_the_record_becomes_values():
    record = PlanRecord.of(PLAN)
    assert (record.release, record.backend, record.plan.argv) == ("k1", "cuda", ("--fit", "off"))
    assert (record.gate.slots, record.gate.gpus[0].planned_bytes, record.gate.argv) == (2, 5, ("llama-server",))
    assert (record.inputs.key, record.inputs.memory.gpu_others_bytes) == ("0123456789abcdef", {"GPU-1": 5})
    assert (record.verified.binary_bytes, record.verified.extra_bytes) == ({"GPU0": 6}, {"GPU0": -1})
    assert record.plan.predicted.decode_tokens_per_s == 30.0
    assert record.raw == PLAN and not record.is_later


def test_a_record_that_was_not_verified_and_has_keys_of_a_newer_version():
    record = PlanRecord.of({**PLAN, "verified": None, "weather": "fine"})
    assert record.verified is None and record.raw["weather"] == "fine"


def changed(*path_and_value):
    *path, last, value = path_and_value
    record = json.loads(json.dumps(PLAN))
    holder = record
    for step in path:
        holder = holder[step]
    holder[last] = value
    return record


@pytest.mark.parametrize(
    "value",
    [
        None, [], [1], 5, "text", {}, changed("schema", 0), changed("schema", True), changed("schema", "1"),
        changed("plan", []), changed("plan", "argv", "--fit off"), changed("gate", "gpus", 0, {}),
        changed("gate", "context_tokens", -1), changed("inputs", "key", 5), changed("inputs", "memory", {}),
        changed("inputs", "memory", "gpu_others_bytes", {}), changed("inputs", "memory", "gpu_others_bytes", "GPU-1", 2**40),
        changed("verified", 5), changed("verified", "extra_bytes", "GPU0", "5"), changed("release", "a\nb"),
        changed("plan", "predicted", "decode_tokens_per_s", float("nan")),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_worth_nothing(value):
    assert PlanRecord.of(value) is None


@pytest.mark.parametrize("schema", [2, 10**30])
def test_a_later_version_is_known_by_its_number_alone(schema):
    record = PlanRecord.of({**PLAN, "schema": schema, "plan": "of another form"})
    assert record.is_later and record.schema == schema and record.plan is None


@FUZZ
@given(broken(PLAN))
def test_a_broken_record_is_read_or_worth_nothing(data):
    record = PlanRecord.of(data)
    assert record is None or record.raw == data


@pytest.mark.parametrize(
    ("written", "source"), [("hf:a/b/c.gguf", "hf:a/b/c.gguf"), (["x"], None), (None, None), (3, None)]
)
def test_a_source_is_a_text_or_unknown(written, source):
    record = PlanRecord.of({"schema": 1, "source": written})
    assert record is not None and record.source == source
