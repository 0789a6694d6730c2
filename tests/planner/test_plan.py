"""Plans: one situation in each case file under tests/plans, and properties that hold in every situation."""

import dataclasses
import json
import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llamafleet.model.gguf import Header
from llamafleet.planner.backend import resolve_backend
from llamafleet.planner.partition import cut, fill
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from sandbox import models
from tests import planning
from tests.planning import MIB, argument

CASES = sorted((Path(__file__).parents[1] / "plans").glob("*.yaml"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_situation(path):
    case = yaml.safe_load(path.read_text())
    host = planning.machine(**case.get("machine", {}))
    entries = [{k: v for k, v in model.items() if k not in ("layout", "quant")} for model in case["models"]]
    settings = planning.settings(*entries, **case.get("settings", {}))
    layouts = [(model["layout"], model.get("quant", "")) for model in case["models"]]
    answers = planning.plans(host, layouts, settings)
    for answer, expected in zip(answers, case["expect"], strict=True):
        check(answer, expected)


def check(answer, expected):
    """Check every key of the expectation; an unknown key is a KeyError."""
    for key, value in expected.items():
        CHECKS[key](answer, value)
    if isinstance(answer, Plan):
        assert all(row.free_bytes >= 0 for row in answer.ledger)
        assert "refusal" not in expected


def spilled(answer, layers):
    first, last = layers
    assert answer.placement.spilled == frozenset(range(first, last + 1))


def flag_values(answer, flags):
    assert {flag: argument(answer.argv, flag) for flag in flags} == {
        f: None if v is None else str(v) for f, v in flags.items()
    }


def refusal(answer, expected):
    assert isinstance(answer, Refusal)
    refused = answer.to_json()["refusal"]
    assert refused["device"] == expected.get("device", "host")
    assert re.search(expected["reason"], refused["reason"])
    assert re.search(expected.get("suggestion", ""), "\n".join(refused["suggestions"]))
    if expected.get("numbers", True):
        assert refused["needed_bytes"] > refused["available_bytes"] >= 0


def devices(answer, names):
    assert [row.device for row in answer.ledger] == names


def why(answer, pattern):
    assert re.search(pattern, "\n".join(answer.why))


def override(answer, pattern):
    assert re.search(pattern, argument(answer.argv, "--override-tensor"))


def gpu_mib(answer, bounds):
    used = [row.used_bytes // MIB for row in answer.ledger[:-1]]
    assert all(low <= size <= high for size, (low, high) in zip(used, bounds, strict=True)), used


CHECKS = {
    "spilled": spilled, "flags": flag_values, "refusal": refusal, "devices": devices, "why": why, "gpu_mib": gpu_mib,
    "override": override,
    "fits": lambda answer, value: answer.fits is value or pytest.fail(str(answer)),
    "kv_type": lambda answer, value: answer.kv_type == value or pytest.fail(answer.kv_type),
    "backend": lambda answer, value: answer.backend == value or pytest.fail(answer.backend),
    "cpus": lambda answer, value: answer.cpus == value or pytest.fail(answer.cpus),
    "numa_nodes": lambda answer, value: answer.numa_nodes == value or pytest.fail(answer.numa_nodes),
    "environment": lambda answer, value: dict(answer.environment) == value or pytest.fail(str(answer.environment)),
}  # fmt: skip


# --- the contract ---------------------------------------------------------------------------------

ROW = {
    "device",
    "weights_bytes",
    "kv_bytes",
    "compute_bytes",
    "staging_bytes",
    "overhead_bytes",
    "capacity_bytes",
    "free_bytes",
    "reserve_bytes",
}


@pytest.mark.parametrize(("ram_gib", "fits"), [(64, True), (16, False)])
def test_the_json_is_the_contract(ram_gib, fits):
    settings = planning.settings({"context_tokens": 131072})
    [answer] = planning.plans(planning.machine([24564], ram_gib=ram_gib), [("gpt-oss-120b",)], settings)
    contract = json.loads(json.dumps(answer.to_json()))
    assert list(contract) == ["schema", "fits", "argv", "ledger", "predicted", "why", "refusal", "problems"]
    assert (contract["schema"], contract["fits"]) == (1, fits)
    assert [set(row) for row in contract["ledger"]] == [ROW, ROW]
    assert {"decode_tokens_per_s", "prefill_tokens_per_s"} <= set(contract["predicted"])
    assert (contract["refusal"] is None) is fits
    assert (contract["argv"] == []) is not fits
    if not fits:
        assert set(contract["refusal"]) == {"reason", "device", "needed_bytes", "available_bytes", "suggestions"}


def test_no_path_address_or_name_is_in_the_planned_part():
    [answer] = planning.plans(planning.machine([24564]), [("Llama-3.1-8B",)], planning.settings({}))
    assert not {"--model", "--host", "--port", "--alias"} & set(answer.argv)


def test_what_the_stages_read_of_a_plan():
    settings = planning.settings({"context_tokens": 131072})
    [answer] = planning.plans(planning.machine([24564, 24564]), [("gpt-oss-120b",)], settings)
    assert [(gpu.uuid, size) for gpu, size in answer.gpu_bytes] == [
        (f"GPU-{n}", row.used_bytes) for n, row in enumerate(answer.ledger[:-1])
    ]
    assert answer.host_bytes == answer.ledger[-1].used_bytes


# --- any situation --------------------------------------------------------------------------------

HOSTS = st.builds(
    lambda gpus, ram: planning.machine(gpus, ram_gib=ram),
    st.lists(st.integers(2000, 100_000), max_size=4), st.sampled_from([4, 16, 32, 64, 128, 512]),
)  # fmt: skip
INSTANCES = st.builds(
    lambda *given: dict(zip(("context_tokens", "slots", "kv_types", "ubatch_tokens"), given, strict=True)),
    st.integers(256, 32768), st.integers(1, 6), st.sampled_from([["f16"], ["f16", "q8_0"], ["q4_0"]]),
    st.sampled_from([512, 2048]),
)  # fmt: skip


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.long)])
def test_a_plan_is_sound_and_always_the_same(count):
    examples(max_examples=count, deadline=None)(
        given(HOSTS, INSTANCES, st.sampled_from(sorted(models.PUBLISHED)))(sound)
    )()


def sound(host, instance, layout):
    """Plan twice, and check what holds for every plan and every refusal."""
    instance["context_tokens"] = min(instance["context_tokens"], planning.header(layout).get("context_length"))
    settings = planning.settings(instance)
    [answer] = planning.plans(host, [(layout,)], settings)
    assert planning.plans(host, [(layout,)], settings) == (answer,)
    model = planning.header(layout)
    if not answer.ledger:  # refused before anything was placed: heads without a kernel, and a quantised cache alone
        assert instance["kv_types"] == ["q4_0"] and "has no KV cache of q4_0" in answer.reason
        assert "needs flash attention" in answer.suggestions[0]
        return
    planned = sum(row.weights_bytes for row in answer.ledger)
    names = {tensor.name: tensor.bytes for tensor in model.tensors}
    tied = 0 if "output.weight" in names else names["token_embd.weight"]
    trunk = model.get("block_count") - (model.get("nextn_predict_layers") or 0)
    loaded = sum(size for name, size in names.items() if not name.startswith(f"blk.{trunk}."))
    # Padding, and rotation factors on each device.
    assert min(abs(planned - loaded), abs(planned - loaded - tied)) < MIB
    assert all(
        row.capacity_bytes - row.used_bytes - row.free_bytes in (1024 * MIB, 2048 * MIB) for row in answer.ledger
    )
    if isinstance(answer, Plan):
        assert all(row.free_bytes >= 0 for row in answer.ledger)
        assert sum(answer.placement.split()) == answer.placement.gpu_layers
        assert 0 <= answer.context_tokens - instance["context_tokens"] < 256  # whole cells, never less than requested
    else:
        assert answer.needed_bytes > answer.available_bytes
        assert answer.suggestions


def sums(costs):
    return list(accumulate(costs, initial=0))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.lists(st.integers(0, 200), min_size=1, max_size=4))
def test_layers_are_cut_in_order_and_within_every_budget(costs, budgets):
    ends = fill(sums(costs), 0, budgets, [1.0] * len(budgets))
    assert (ends is None) == (cut(sums(costs), 0, budgets) is None)
    if ends is not None:
        starts = (0, *ends)
        assert ends[-1] == len(costs)
        for start, end, budget in zip(starts, ends, budgets, strict=False):
            assert start < end
            assert sum(costs[start:end]) <= budget


def test_equal_devices_are_filled_evenly_and_slow_ones_last():
    assert fill(sums([10] * 8), 0, [100, 100], [1, 1]) == (4, 8)
    assert fill(sums([10] * 9), 0, [200, 100], [1, 1]) == (6, 9)
    assert fill(sums([10] * 31), 0, [200, 100], [1, 1]) is None
    assert fill(sums([10] * 12), 0, [100, 100], [2, 1]) == (10, 12)
    assert fill(sums([10] * 12), 0, [100, 100], [1, 2]) == (2, 12)


def test_own_memory_does_not_change_the_plan():
    # The server of the last run holds RAM: less is available, the total is what it was.
    wanted = planning.settings({"context_tokens": 131072})
    before, after = (
        planning.plans(planning.machine([24564], available_gib=gib), [("gpt-oss-120b",)], wanted)[0] for gib in (60, 10)
    )
    assert before.argv == after.argv
    assert any("warning" in reason for reason in after.why)


def test_the_second_instance_gets_what_the_first_leaves():
    both = planning.settings({"context_tokens": 8192}, {"context_tokens": 8192})
    host = planning.machine([12282])
    first, second = planning.plans(host, [("Llama-3.1-8B",), ("Qwen3-30B-A3B",)], both)
    alone = planning.plans(host, [("Qwen3-30B-A3B",)], planning.settings({"context_tokens": 8192}))[0]
    assert second.ledger[0].capacity_bytes == first.ledger[0].capacity_bytes - first.ledger[0].used_bytes
    assert len(second.placement.spilled) > len(alone.placement.spilled)
    assert first.ledger[0].used_bytes + second.ledger[0].used_bytes + 1024 * MIB <= 12282 * MIB


def test_a_refused_instance_takes_nothing():
    three = planning.settings({"context_tokens": 8192}, {"context_tokens": 8192})
    refused, served = planning.plans(planning.machine([8192], ram_gib=16), [("gpt-oss-120b",), ("Qwen3-8B",)], three)
    alone = planning.plans(
        planning.machine([8192], ram_gib=16), [("Qwen3-8B",)], planning.settings({"context_tokens": 8192})
    )
    assert isinstance(refused, Refusal)
    assert served.ledger == alone[0].ledger


def refused(ram_gib, *instances, layout="Qwen3-8B", **settings):
    """The refusal of the last of these instances, which all serve this model on a host without a GPU."""
    wanted = planning.settings(*({"context_tokens": 4096, **one} for one in instances), **settings)
    answer = planning.plans(planning.machine(ram_gib=ram_gib), [(layout,)] * len(instances), wanted)[-1]
    assert isinstance(answer, Refusal)
    return answer


def changed(text):
    """The settings that a suggestion names, with their new values."""
    return {key: int(value) for key, value in re.findall(r"(\w+_mib) to (\d+)", text)}


@pytest.mark.parametrize(
    ("ram_gib", "asked", "keys"),
    [
        (8, {"ram_reserve_mib": 2048}, {"prompt_cache_mib"}),
        (8, {"ram_reserve_mib": 3000, "model_defaults": {"prompt_cache_mib": 0}}, {"ram_reserve_mib"}),
        (7, {"ram_reserve_mib": 2048}, {"prompt_cache_mib", "ram_reserve_mib"}),
    ],
)
def test_less_ram_for_the_prompt_cache_or_the_reserve_is_suggested_where_it_is_enough(ram_gib, asked, keys):
    asked = dict(asked)
    instance = {"context_tokens": 4096, **asked.pop("model_defaults", {})}
    refusal = refused(ram_gib, instance, **asked)
    [suggestion] = [text for text in refusal.suggestions if "_mib to" in text]
    new = changed(suggestion)
    assert set(new) == keys, refusal.suggestions
    instance = {**instance, "prompt_cache_mib": new.get("prompt_cache_mib", instance.get("prompt_cache_mib", 1024))}
    asked["ram_reserve_mib"] = new.get("ram_reserve_mib", asked["ram_reserve_mib"])
    [answer] = planning.plans(planning.machine(ram_gib=ram_gib), [("Qwen3-8B",)], planning.settings(instance, **asked))
    assert isinstance(answer, Plan), suggestion


def test_a_refusal_names_what_is_missing_and_which_models_took_the_rest():
    refusal = refused(16, {"priority": 1}, {"priority": 2}, {})
    missing = (refusal.needed_bytes - refusal.available_bytes + MIB - 1) // MIB
    assert refusal.reason.endswith(f"besides the reserve, {missing} MiB missing")
    first = refusal.suggestions[0]
    assert re.search(r"took the rest: m1 \d+ MiB", first), first
    assert "MiB are prompt_cache_mib" in first and "higher priority" in first
    taken = int(re.search(r"m1 (\d+) MiB", first)[1])
    assert abs(taken - refusal.needed_bytes // MIB) < 100  # the same model


def test_a_reserve_above_all_memory_is_named():
    refusal = refused(8, {}, ram_reserve_mib=9000)
    assert refusal.suggestions[0] == "ram_reserve_mib is 9000, but the host has 8192 MiB of RAM in all: lower it"


@pytest.mark.parametrize(("ram_gib", "name"), [(6, "Q3_K_M"), (5, "Q2_K")])
def test_a_suggested_quantisation_frees_what_is_missing(ram_gib, name):
    refusal = refused(ram_gib, {"prompt_cache_mib": 0}, layout="Llama-3.1-8B", ram_reserve_mib=1000)
    [text] = [text for text in refusal.suggestions if "quantisation" in text]
    size, now = map(int, re.search(r"needs about (\d+) MiB for the weights \(now (\d+) MiB\)", text).groups())
    assert f"take a smaller quantisation: {name} " in text
    assert now == planning.header("Llama-3.1-8B").weights_bytes // MIB
    assert now - size >= (refusal.needed_bytes - refusal.available_bytes) // MIB


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"threads": 999}, "m0: threads: 999 is more than the 16 logical cores of box1"),
        ({"live_tokens": 5000}, "m0: live_tokens: 5000 is more than a slot's context of 4096 tokens"),
    ],
)
def test_more_than_the_host_or_the_context_has_is_refused_with_key_and_value(asked, says):
    assert refused(64, asked).reason.startswith(says)


def test_what_the_host_and_the_context_just_have_is_served():
    wanted = planning.settings({"context_tokens": 4096, "threads": 16, "live_tokens": 4096})
    assert isinstance(planning.plans(planning.machine(), [("Qwen3-8B",)], wanted)[0], Plan)


@pytest.mark.parametrize(
    ("host", "requested"),
    [
        (planning.machine([12282], ram_gib=64), {"context_tokens": 131072, "slots": 8}),
        (planning.machine([4096], ram_gib=16), {"context_tokens": 131072}),
        (planning.machine(ram_gib=12), {"context_tokens": 65536, "slots": 2}),
    ],
)
def test_what_a_refusal_suggests_is_served(host, requested):
    [refused] = planning.plans(host, [("Llama-3.1-8B",)], planning.settings(requested))
    assert isinstance(refused, Refusal)
    matches = [re.findall(r"(slots|context_tokens|kv_types)(?: to)? (\S+?),", text) for text in refused.suggestions]
    changes = [(key, [value] if key == "kv_types" else int(value)) for pairs in matches for key, value in pairs]
    assert changes, refused.suggestions
    for key, value in changes:
        [answer] = planning.plans(host, [("Llama-3.1-8B",)], planning.settings({**requested, key: value}))
        assert isinstance(answer, Plan), (key, value)
        if key == "context_tokens":  # and not much more would be
            [more] = planning.plans(
                host, [("Llama-3.1-8B",)], planning.settings({**requested, key: value * 21 // 20 + 1024})
            )
            assert isinstance(more, Refusal)


# --- the backend ----------------------------------------------------------------------------------


def test_backend_by_vendor():
    assert resolve_backend(planning.machine([1000]), planning.settings()) == "cuda"
    assert resolve_backend(planning.machine([{"vendor": "amd"}]), planning.settings()) == "hip"
    assert resolve_backend(planning.machine([{"vendor": "amd"}]), planning.settings(backend="vulkan")) == "vulkan"
    assert resolve_backend(planning.machine(), planning.settings()) == "cpu"


BROKEN = {"problem": "driver 580 does not answer: reboot"}
LOST = [{"pci_bus_id": "0000:01:00.0", "vendor": "nvidia", "device_id": "0x2684"}]


@pytest.mark.parametrize(
    "host", [planning.machine([BROKEN]), planning.machine(pci_gpus=LOST)], ids=["broken", "no_driver"]
)
def test_never_silently_the_cpu_where_there_is_a_gpu(host):
    refused = resolve_backend(host, planning.settings())
    assert isinstance(refused, Refusal)
    assert 'backend = "cpu"' in " ".join(refused.suggestions)
    assert resolve_backend(host, planning.settings(backend="cpu")) == "cpu"
    [answer] = planning.plans(host, [("Llama-3.2-3B",)], planning.settings({"context_tokens": 4096}))
    assert isinstance(answer, Refusal)
    assert answer.instance == "m0"


def test_two_vendors_need_a_decision():
    refused = resolve_backend(planning.machine([24564, {"vendor": "amd"}]), planning.settings())
    assert isinstance(refused, Refusal)
    assert resolve_backend(planning.machine([24564, {"vendor": "amd"}]), planning.settings(backend="hip")) == "hip"


def answer_for(header):
    settings = planning.settings({"context_tokens": 8192})
    [answer] = plan_host(planning.machine([24564]), [(settings.models[0], header)], settings)
    return answer


def test_a_file_without_layers_is_refused():
    refused = answer_for(Header(3, "llama", {"general.architecture": "llama"}, (), (100,)))
    assert "no language model" in refused.reason


def test_a_projector_is_refused_by_name():
    refused = answer_for(Header(3, "clip", {"general.architecture": "clip"}, (), (100,)))
    assert "is a projector" in refused.reason
    assert refused.suggestions == ("name the model's main GGUF file",)


def renamed(arch):
    """Llama 3.1 8B as if it were of that architecture."""
    header = planning.header("Llama-3.1-8B")
    metadata = {key.replace("llama.", f"{arch}.", 1): value for key, value in header.metadata.items()}
    return dataclasses.replace(header, architecture=arch, metadata=metadata)


def test_what_llama_cpp_does_not_know_is_refused_with_the_nearest_that_it_knows():
    refused = answer_for(renamed("qwen3moee"))
    assert isinstance(refused, Refusal)
    assert "does not know the architecture 'qwen3moee'" in refused.reason
    assert "'qwen3moe'" in refused.reason
    assert "would not load" in refused.reason


def test_what_was_not_held_against_llama_cpp_is_an_upper_bound_and_says_so():
    known, bounded = answer_for(renamed("llama")), answer_for(renamed("xverse"))
    assert any("'xverse' was not compared with llama.cpp" in sentence for sentence in bounded.why)
    assert not any("upper bound" in sentence for sentence in known.why)
    assert bounded.ledger[0].compute_bytes > known.ledger[0].compute_bytes
    assert bounded.ledger[0].kv_bytes >= known.ledger[0].kv_bytes


@pytest.mark.parametrize(
    ("layout", "mib", "checkpoints", "counted_mib"),
    [
        ("Gemma-3-12B", 1024, 3, 3 * 320),  # 40 of 48 layers have a window: 1024 tokens of 8 heads of 256, K and V, f16
        ("Gemma-3-12B", 100, 0, 0),
        ("gpt-oss-20b", 1024, 32, 32 * 3),  # 12 of 24: 128 tokens of 8 heads of 64
        ("Llama-3.1-8B", 1024, 32, 0),
    ],
)
def test_context_checkpoints_take_no_more_ram_than_they_may(layout, mib, checkpoints, counted_mib):
    host = planning.machine([24564], ram_gib=64)
    given = {"context_tokens": 32768, "ubatch_tokens": 512}
    settings = planning.settings({**given, "context_checkpoints_mib": mib})
    without = planning.settings({**given, "context_checkpoints_mib": 0})
    [plan], [bare] = planning.plans(host, [(layout,)], settings), planning.plans(host, [(layout,)], without)
    assert planning.argument(plan.argv, "--ctx-checkpoints") == str(checkpoints)
    assert 0 <= (plan.host_bytes - bare.host_bytes) / planning.MIB - counted_mib <= 0.03 * checkpoints
    assert plan.host_bytes - bare.host_bytes <= mib * planning.MIB


@pytest.mark.parametrize(
    ("architecture", "head", "kv_types", "expected"),
    [("llama", 80, ["q8_0", "f16"], "f16"), ("llama", 80, ["q8_0"], None), ("grok", 128, ["q8_0", "f16"], "f16")],
)
def test_no_cache_is_planned_that_llama_server_refuses(architecture, head, kv_types, expected):
    """Blocks of 32 do not divide heads of 80; Grok has no flash attention, which quantised caches need."""
    plain = planning.header("Llama-3.1-8B")
    metadata = {key.replace("llama.", f"{architecture}.", 1): value for key, value in plain.metadata.items()}
    metadata |= {f"{architecture}.attention.{part}_length": head for part in ("key", "value")}
    header = replace(plain, architecture=architecture, metadata=metadata)
    settings = planning.settings({"kv_types": kv_types, "context_tokens": 4096})
    (answer,) = plan_host(planning.machine([24564]), [(settings.models[0], header)], settings)
    if expected is None:
        assert "no KV cache of q8_0" in answer.reason
        assert "f16" in answer.suggestions[0]
    else:
        assert argument(answer.argv, "--cache-type-k") == expected
