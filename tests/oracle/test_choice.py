"""Does llama-server place weights and caches as planned, for plans that split a layer or use two GPUs?"""

import pytest

from llamafleet.planner.result import Plan
from sandbox import models
from sandbox.oracle import ask
from tests import planning
from tests.planning import MIB, machine

pytestmark = pytest.mark.oracle

BESIDE = {"total_mib": 12288, "name": "NVIDIA GeForce RTX 3060", "pcie_width": 4}
# Layout, settings, and machines by their GPUs: the first machine whose plan fulfils the condition is used.
CASES = {
    "a layer of a mixture of experts in part": (
        "gpt-oss-120b", {"context_tokens": 131072}, [[mib] for mib in range(16000, 18000, 200)],
        lambda placed: placed.spilled and placed.partly,
    ),
    "experts by both ends of two GPUs": (
        "gpt-oss-120b", {"context_tokens": 131072}, [[24564, BESIDE]],
        lambda placed: min(placed.spilled) < placed.split()[0] <= max(placed.spilled) + 1,
    ),
    "feed-forward parts of a dense model": (
        "Qwen3-32B", {"context_tokens": 16384, "live_tokens": 16000}, [[16384]], lambda placed: placed.spilled,
    ),
    "whole layers, and a part of one": (
        "Qwen3-32B", {"context_tokens": 16384, "live_tokens": 100}, [[mib] for mib in range(15000, 17000, 100)],
        lambda placed: None in placed.layer_devices and placed.partly,
    ),
}  # fmt: skip


def plan_of(layout, instance, machines, condition):
    for gpus in machines:
        [result] = planning.plans(machine(gpus, ram_gib=128), [(layout,)], planning.settings(instance))
        if isinstance(result, Plan) and condition(result.placement):
            return result
    raise AssertionError(f"{layout}: no machine leads to such a plan")


@pytest.mark.parametrize("case", CASES)
def test_llama_server_puts_weights_and_cache_where_the_plan_says(case, tmp_path):
    plan = plan_of(*CASES[case])
    flags = [word.replace("CUDA", "RPC") for word in plan.argv]
    at = flags.index("--fit")
    answer = ask(models.weightless(tmp_path, CASES[case][0]), [*flags[:at], *flags[at + 2 :]], len(plan.gpus))
    for row, device in zip(answer.devices, plan.ledger[:-1], strict=True):
        assert abs(device.weights_bytes / MIB - row.model) <= 2
        assert abs(device.kv_bytes / MIB - row.context) <= 1
        assert abs(row.compute * MIB - device.compute_bytes) <= 16 * MIB  # RPC devices have no op-offload
