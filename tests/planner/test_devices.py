"""Which GPUs plans use by the settings, and what is said of the others."""

from __future__ import annotations

import dataclasses

import pytest

from llamafleet.cli import tables
from llamafleet.planner.backend import resolve_backend
from llamafleet.planner.devices import gpus_for, left_out, only_used, reserve_mib
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from llamafleet.planner.stability import InstalledPlan, RecordedMemory, inputs_key, keep_or_replan
from tests import planning

MIB = 1 << 20
MODEL = {"backend": "cuda", "files": [["model.gguf", 1, None]]}
TWO = planning.machine([24564, {"total_mib": 12282, "name": "NVIDIA GeForce RTX 3060"}])
SLICES = [{"total_mib": 20000, "mig": True, "uuid": f"MIG-{n}", "pci_bus_id": "0000:01:00.0"} for n in range(3)]


def plans(machine, models=1, **settings):
    asked = [{"context_tokens": 8192}] * models
    return planning.plans(machine, [("Llama-3.1-8B",)] * models, planning.settings(*asked, **settings))


# --- gpus ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [1, "1", "GPU1", "GPU-1", "gpu-1", "0000:02:00.0", "02:00.0", "00000000:02:00.0 "])
def test_a_gpu_is_named_by_index_uuid_or_pci_id(name):
    """ollama#1813, #3095: another program keeps the other card."""
    [plan] = plans(TWO, gpus=[name])
    assert [gpu.index for gpu in plan.gpus] == [1]
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert "GPU0 (NVIDIA GeForce RTX 4090) is not used: gpus does not name it" in plan.why


@pytest.mark.parametrize("name", [-1, True, 1.5, "", "RTX 4090", "0:1", None, "GPU-" + "x" * 200, [0]])
def test_what_is_no_name_of_a_gpu_is_refused(name):
    with pytest.raises(ValueError, match=r"gpus\[1\]: should be a GPU's index, UUID or PCI id"):
        planning.settings(gpus=[0, name])


@pytest.mark.parametrize("value", [0, "0", {"0": 1}])
def test_gpus_is_a_list(value):
    with pytest.raises(ValueError, match=r"gpus: should be a list of GPUs by index, UUID or PCI id, .* or None, is"):
        planning.settings(gpus=value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"gpus": [0, 7]}, "gpus"), ({"gpu_reserve_mib": {7: 1, "default": 2}}, "gpu_reserve_mib")],
)
def test_a_gpu_that_the_host_does_not_have_is_refused_with_those_that_it_has(settings, key):
    refused = resolve_backend(TWO, planning.settings(**settings))
    assert isinstance(refused, Refusal)
    assert refused.reason == (
        f"{key}: box1 has no GPU 7; it has 0 (NVIDIA GeForce RTX 4090, 0000:01:00.0, GPU-0), "
        "1 (NVIDIA GeForce RTX 3060, 0000:02:00.0, GPU-1)"
    )


def test_no_gpu_at_all_can_be_asked_for():
    [plan] = plans(TWO, gpus=[])
    assert (plan.backend, plan.gpus) == ("cpu", ())
    assert len([reason for reason in plan.why if reason.endswith("gpus does not name it")]) == 2
    [refused] = plans(TWO, gpus=[], backend="cuda")
    assert "no GPU that this backend can use" in refused.reason


def test_gpus_decides_between_vendors_and_what_is_compiled():
    host = planning.machine([{"compute_capability": "6.1"}, {"vendor": "amd", "name": "Radeon"}, {}])
    assert isinstance(resolve_backend(host, planning.settings()), Refusal)
    settings = planning.settings(gpus=[2])
    assert resolve_backend(host, settings) == "cuda"
    assert [gpu.index for gpu in only_used(host, "cuda", settings).gpus] == [2]
    assert resolve_backend(host, planning.settings(gpus=[1])) == "hip"


def test_hip_counts_amds_gpus_alone():
    host = planning.machine([24564, {"vendor": "amd", "name": "Radeon RX 7900 XTX"}])
    [plan] = plans(host, backend="hip")
    assert plan.environment == {"HIP_VISIBLE_DEVICES": "0"}


def test_an_integrated_gpu_that_is_named_is_used():
    host = planning.machine([24564, {"vendor": "amd", "unified_memory": True, "total_mib": 16384}])
    assert [gpu.index for gpu in gpus_for(host, "hip", planning.settings(gpus=[1]))] == [1]


SMALL = {"vendor": "amd", "unified_memory": True, "total_mib": 16384, "name": "Radeon", "compute_units": 2}


def test_the_display_chip_of_a_desktop_ryzen_is_left_to_displays():
    """ollama#10204 without a card: two compute units are slower than the processor."""
    [plan] = plans(planning.machine([SMALL]))
    said = "it has 2 compute units, for displays: the processor is faster; name it in gpus to use it"
    assert plan.backend == "cpu" and f"GPU0 (Radeon) is not used: {said}" in plan.why
    [plan] = plans(planning.machine([SMALL]), gpus=[0])
    assert plan.backend == "hip" and len(plan.gpus) == 1
    [plan] = plans(planning.machine([SMALL]), backend="hip")
    assert len(plan.gpus) == 1
    [plan] = plans(planning.machine([{**SMALL, "compute_units": 40}]))
    assert plan.backend == "hip"  # Strix Halo
    [plan] = plans(planning.machine([{**SMALL, "compute_units": None}]))
    assert plan.backend == "hip"  # not told


def test_a_setting_that_is_not_given_leaves_every_hash_as_it_was():
    """Hosts that were deployed before the setting was there are not planned anew for it."""
    [instance] = planning.settings({"context_tokens": 8192}).models
    before = inputs_key(TWO, planning.settings({"context_tokens": 8192}), instance, MODEL)
    assert before == "bc373e89cb537dee"  # as it was before there was such a setting
    assert inputs_key(TWO, planning.settings({"context_tokens": 8192}, gpus=[0]), instance, MODEL) != before


# --- what is left out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"backend": "cpu"}, 'the backend is "cpu"'),
        ({"backend": "hip"}, 'the backend "hip" does not use it'),
        ({"gpus": [1]}, "gpus does not name it"),
    ],
)
def test_the_setting_that_leaves_a_gpu_out_is_named(settings, reason):
    host = planning.machine([24564, {"vendor": "amd", "name": "Radeon"}])
    backend = settings.get("backend", "hip")
    assert left_out(host, backend, planning.settings(**settings))[0] == (
        f"GPU0 (NVIDIA GeForce RTX 4090) is not used: {reason}"
    )


def test_a_gpu_that_vulkan_does_not_list_is_named_with_the_way_out():
    listed = {"index": 0, "name": "RTX 4090", "kind": "discrete", "driver": "", "uuid": "0" * 32,
              "pci_bus_id": "0000:01:00.0", "memory_total_bytes": 1}  # fmt: skip
    host = planning.machine([24564, 24564], vulkan=[listed])
    [reason] = left_out(host, "vulkan", planning.settings(backend="vulkan"))
    assert reason.startswith("GPU1 (NVIDIA GeForce RTX 4090) is not used: Vulkan does not list it: install")


def test_each_model_is_told_what_is_wrong_with_the_host_and_refusals_are_too():
    problem = "NVIDIA: module 570 is loaded but the libraries are 580: reboot needed"
    host = planning.machine([24564], problems=[problem])
    [good, refused] = planning.plans(
        host, [("Llama-3.2-3B",), ("gpt-oss-120b",)],
        planning.settings({"context_tokens": 8192}, {"context_tokens": 131072, "prompt_cache_mib": 60000}),
    )  # fmt: skip
    assert isinstance(good, Plan) and isinstance(refused, Refusal)
    assert good.problems == refused.problems == (problem,)
    assert good.to_json()["problems"] == refused.to_json()["problems"] == [problem]
    assert all(tables.table(result, "box1").splitlines()[-1] == f"  ! {problem}" for result in (good, refused))


# --- MIG ----------------------------------------------------------------------------------------------------------


def test_a_plan_uses_one_mig_instance_and_the_next_model_another():
    """llama.cpp#3520, pytorch#130181: one plan over two instances, of which a process sees one."""
    first, second = plans(planning.machine(SLICES), models=2)
    assert [plan.environment["CUDA_VISIBLE_DEVICES"] for plan in (first, second)] == ["MIG-0", "MIG-1"]
    assert "MIG instances that are left to other models: GPU1, GPU2: a process sees one of them at most" in first.why


def test_a_model_that_needs_two_mig_instances_spills_to_the_ram():
    [plan] = planning.plans(
        planning.machine(SLICES, ram_gib=128), [("gpt-oss-120b",)], planning.settings({"context_tokens": 8192})
    )
    assert len(plan.gpus) == 1 and plan.placement.spilled


def test_mig_instances_beside_whole_gpus_are_no_part_of_their_plans():
    host = planning.machine([{"uuid": "GPU-a"}, {"uuid": "GPU-b"}, *SLICES], ram_gib=128)
    [plan] = planning.plans(host, [("gpt-oss-120b",)], planning.settings({"context_tokens": 8192}))
    assert [gpu.uuid for gpu in plan.gpus] == ["GPU-a", "GPU-b"]


# --- the reserve of each GPU --------------------------------------------------------------------------------------


def reserves(plan):
    return {row.device: row.reserve_bytes // MIB for row in plan.ledger}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (512, [512, 512]),
        ({0: 6144, "default": 256}, [6144, 256]),
        ({"GPU-1": 4096}, [1024, 4096]),  # the others keep the default
        ({"0000:01:00.0": 0, "GPU1": 77}, [0, 77]),
    ],
)
def test_each_gpu_has_its_reserve(setting, expected):
    settings = planning.settings({"context_tokens": 131072}, gpu_reserve_mib=setting)
    assert [reserve_mib(gpu, settings) for gpu in TWO.gpus] == expected
    [plan] = planning.plans(TWO, [("gpt-oss-120b",)], settings)
    assert len(plan.gpus) == 2
    assert reserves(plan) == {"GPU0": expected[0], "GPU1": expected[1], "host": 2048}
    assert all(row.free_bytes >= 0 for row in plan.ledger)


def test_a_larger_reserve_of_one_gpu_moves_what_it_holds():
    def held(**settings):
        [plan] = planning.plans(TWO, [("gpt-oss-120b",)], planning.settings({"context_tokens": 131072}, **settings))
        return {row.device: row.used_bytes for row in plan.ledger}

    less = held(gpu_reserve_mib={0: 8192})
    assert less["GPU0"] + 8192 * MIB <= 24564 * MIB < held()["GPU0"] + 8192 * MIB


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1, "should be a whole number from 0 to 2147483647, is -1"),
        ("1024", "or a dictionary of such by GPU"),
        ({0: -1}, "or a dictionary of such by GPU"),
        ({"defaults": 1}, 'should have keys that are "default", or each a GPU\'s index, UUID or PCI id'),
    ],
)
def test_a_reserve_of_another_form_is_refused(value, said):
    with pytest.raises(ValueError, match="gpu_reserve_mib: should") as error:
        planning.settings(gpu_reserve_mib=value)
    assert said in str(error.value)


def test_a_gpu_may_drift_by_a_share_of_its_own_reserve():
    """900 MiB less are within a quarter of 4096 MiB, and beyond a quarter of 1024."""

    def kept(reserve):
        settings = planning.settings({"context_tokens": 131072}, gpu_reserve_mib=reserve)
        [instance] = settings.models
        header = planning.header("gpt-oss-120b")

        def planner(machine):
            return plan_host(machine, [(instance, header)], settings)

        [plan] = planner(TWO)
        drifted = dataclasses.replace(TWO.gpus[0], memory_used_by_others_bytes=900 * MIB)
        now = dataclasses.replace(TWO, gpus=(drifted, TWO.gpus[1]))
        installed = {"m0": InstalledPlan(plan.argv, RecordedMemory.of(TWO))}
        return keep_or_replan(now, settings, planner, installed).why

    assert kept({0: 4096}).startswith("kept") and kept({1: 4096}).startswith("changed")
