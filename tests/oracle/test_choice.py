"""Flags of plans that split a layer, spill feed-forward parts or cut between GPUs: does llama-server do what they mean?"""

import pytest

from llamafleet.planner.result import Plan
from sandbox import models
from sandbox.oracle import ask
from tests import planning
from tests.planning import MIB, machine

pytestmark = pytest.mark.oracle

BESIDE = {"total_mib": 12288, "name": "NVIDIA GeForce RTX 3060", "pcie_width": 4}
# Layout, what is asked, and GPUs of several sizes: the first is taken whose plan is of the kind.
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


def plan_of(layout, asked, boxes, kind):
    for gpus in boxes:
        [answer] = planning.plans(machine(gpus, ram_gib=128), [(layout,)], planning.settings(asked))
        if isinstance(answer, Plan) and kind(answer.placement):
            return answer
    raise AssertionError(f"no plan of that kind for {layout}")


@pytest.mark.parametrize("case", CASES)
def test_llama_server_puts_weights_and_cache_where_the_plan_says(case, tmp_path):
    answer = plan_of(*CASES[case])
    flags = [word.replace("CUDA", "RPC") for word in answer.argv]
    at = flags.index("--fit")
    told = ask(models.weightless(tmp_path, CASES[case][0]), [*flags[:at], *flags[at + 2 :]], len(answer.gpus))
    for row, device in zip(told.devices, answer.ledger[:-1], strict=True):
        assert abs(device.weights_bytes / MIB - row.model) <= 2
        assert abs(device.kv_bytes / MIB - row.context) <= 1
        assert abs(row.compute * MIB - device.compute_bytes) <= 16 * MIB  # RPC devices have no op-offload
