"""A projector beside its model: where it is planned, what it takes, and what does not belong together."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from llamafleet.model.gguf import read_path
from llamafleet.planner.plan import plan_host
from llamafleet.planner.reconcile import MemoryReport, compare, memory_limits
from llamafleet.planner.result import Plan, Refusal
from sandbox import projectors
from tests import planning

MIB = 2**20


@functools.cache
def projector(name):
    with tempfile.TemporaryDirectory() as folder:
        return read_path(projectors.write(projectors.PUBLISHED_PROJECTORS[name], Path(folder)))


def plan(gpus=(24564,), layout="Gemma-3-12B", name="gemma-3-12b", ram_gib=64, host=None, **settings):
    asked = planning.settings({"projector": "/mmproj.gguf", "context_tokens": 8192, **settings})
    host = host or planning.machine(gpus, ram_gib=ram_gib)
    [found] = plan_host(host, [(asked.models[0], planning.header(layout))], asked,
                        companions={"m0": {"projector": projector(name)}})  # fmt: skip
    return found


def row(found, device):
    return next(one for one in found.ledger if one.device == device)


def test_it_is_on_the_gpu_where_there_is_room():
    found = plan()
    assert planning.argument(found.argv, "--mmproj-device") == "CUDA0"
    # 815 MiB of weights, 119 to compute a picture of 4096 patches, and what a matrix product takes beside.
    assert 995 < row(found, "GPU0").beside_bytes / MIB < 1010
    assert row(found, "host").beside_bytes > 120 * MIB  # pictures on their way
    assert any("projector on GPU0" in why and "256 tokens" in why for why in found.why)


def test_it_is_on_the_host_where_the_model_leaves_no_room():
    # 12 billion weights of four bits and a cache fill this card.
    found = plan(gpus=(10240,))
    assert isinstance(found, Plan)
    assert "--no-mmproj-offload" in found.argv
    assert row(found, "GPU0").beside_bytes == 0
    assert row(found, "host").beside_bytes > 934 * MIB
    assert any("a picture takes seconds there" in why for why in found.why)


def test_a_gpu_that_is_too_small_for_it_alone_is_not_tried():
    found = plan(gpus=(9400, 2048), context_tokens=4096)
    assert "--no-mmproj-offload" in found.argv


def test_without_a_gpu_it_is_on_the_host_and_no_place_is_said_to_be_slow():
    found = plan(gpus=())
    assert "--no-mmproj-offload" in found.argv
    assert not any("seconds there" in why for why in found.why)


def test_a_second_gpu_takes_it_where_the_first_is_full():
    found = plan(gpus=(9400, 4096), context_tokens=4096)
    assert planning.argument(found.argv, "--mmproj-device") == "CUDA1"
    alone = row(found, "GPU1")
    assert alone.beside_bytes > 990 * MIB and alone.weights_bytes == 0
    # The process has a context there too, and the reserve stays.
    assert alone.overhead_bytes == row(found, "GPU0").overhead_bytes > 0
    assert alone.free_bytes == 4096 * MIB - alone.used_bytes - alone.reserve_bytes >= 0
    assert [gpu.index for gpu in found.gpus] == [0, 1]


def test_one_memory_for_gpu_and_cpu_counts_it_once():
    gpu = {"unified_memory": True, "total_mib": 65536, "name": "NVIDIA GB10"}
    found = plan(host=planning.machine((gpu,), ram_gib=64))
    assert planning.argument(found.argv, "--mmproj-device") == "CUDA0"
    without = replace(found, argv=())
    assert sum(one.beside_bytes for one in without.ledger) < 1400 * MIB


def test_a_plan_without_one_has_no_flag_of_it():
    asked = planning.settings({"context_tokens": 8192})
    [found] = planning.plans(planning.machine((24564,)), [("Gemma-3-12B",)], asked)
    assert not any("mmproj" in word or "image" in word for word in found.argv)
    assert all(one.beside_bytes == 0 and "beside_bytes" not in one.to_json() for one in found.ledger)


def test_tokens_that_see_each_other_are_in_one_ubatch():
    # Gemma 4 attends to a picture in both directions: 1120 tokens of it.
    found = plan(layout="Gemma-3-27B", name="gemma-4-31b")
    assert int(planning.argument(found.argv, "--ubatch-size")) >= 1120
    smaller = plan(layout="Gemma-3-27B", name="gemma-4-31b", image_max_tokens=400)
    assert planning.argument(smaller.argv, "--image-max-tokens") == "400"
    assert planning.argument(smaller.argv, "--ubatch-size") == "512"


def test_fewer_tokens_of_a_picture_take_less():
    sizes = [row(plan(layout="Qwen3-8B", name="glm-4.1v-9b", image_max_tokens=most), "GPU0").beside_bytes
             for most in (None, 1024)]  # fmt: skip
    assert sizes[0] - sizes[1] > 300 * MIB


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"name": "gemma-3-27b"}, 'makes embeddings of 5376 numbers, Gemma-3-12B takes 3840: it is another model\'s'),
        ({"image_max_tokens": 300}, "image_max_tokens: pictures of gemma3 have one size, 256 tokens each"),
        ({"ubatch_tokens": 128}, "ubatch_tokens is 128, but the 256 tokens of a picture must be in one ubatch"),
        ({"name": "gemma-4-31b", "layout": "Gemma-3-27B", "image_min_tokens": 2000},
         "image_min_tokens is 2000, but gemma4v makes 1120 tokens at most"),
        ({"name": "gemma-4-31b", "layout": "Gemma-3-27B", "context_tokens": 1024},
         "a picture takes up to 1120 tokens, and context_tokens is 1024"),
        ({"name": "voxtral-mini-3b", "layout": "Llama-3.2-3B", "image_max_tokens": 100},
         "the projector hears and does not see"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_downloaded(changes, found):
    refused = plan(**changes)
    assert isinstance(refused, Refusal)
    assert found in refused.reason


def test_a_model_is_no_projector():
    asked = planning.settings({"projector": "/mmproj.gguf", "context_tokens": 8192})
    [refused] = plan_host(planning.machine((24564,)), [(asked.models[0], planning.header("Qwen3-8B"))], asked,
                          companions={"m0": {"projector": planning.header("Qwen3-0.6B")}})  # fmt: skip
    assert "is a model of architecture qwen3, not a projector (clip)" in refused.reason


def reported(found, projector_bytes=None):
    """llama-server's answer that agrees with the plan; `projector_bytes`: what it says of the projector."""
    counted = {
        row.device: row.weights_bytes + row.kv_bytes + row.compute_bytes + row.staging_bytes for row in found.ledger
    }
    beside = {} if projector_bytes is None else {"projector": projector_bytes}
    return MemoryReport({"CUDA0": counted["GPU0"], "Host": counted["host"], **beside})


def test_what_the_binary_reports_of_a_projector_is_compared():
    found = plan()
    device, at_start = found.reported_beside["projector"]
    assert (device, at_start // MIB) == ("GPU0", 943)
    assert compare(found, reported(found, at_start)).beyond(only_more=False) == {}
    more = compare(found, reported(found, at_start + 300 * MIB))
    assert more.beyond(only_more=False) == {"GPU0": 300 * MIB}
    # llama.cpp of before did not tell it.
    assert compare(found, reported(found)).beyond(only_more=False) == {}
    assert memory_limits(found)["devices"]["projector"] == "GPU0"


def test_a_projector_on_the_host_is_compared_with_the_host():
    found = plan(gpus=(10240,))
    device, at_start = found.reported_beside["projector"]
    assert device == "host"
    verified = compare(found, reported(found, at_start + 300 * MIB))
    assert verified.beyond(only_more=False) == {"host": 300 * MIB}


@pytest.mark.parametrize(
    ("ram_gib", "suggested"),
    [
        (11, "set image_max_tokens to 2048 (now 4096), and it fits"),
        (10, "set image_max_tokens to 256 (now 4096), and it fits"),
        (9, "set projector to None, and it fits"),
        (8, "choose a smaller model"),
    ],
)
def test_smaller_pictures_are_suggested_where_the_largest_does_not_fit(ram_gib, suggested):
    refused = plan(gpus=(), layout="Qwen3-8B", name="glm-4.1v-9b", ram_gib=ram_gib, prompt_cache_mib=0)
    assert isinstance(refused, Refusal)
    assert refused.suggestions[0].startswith(suggested)
    if "image_max_tokens" in suggested:
        tokens = int(suggested.split(" (")[0].rsplit(" ", 1)[1])
        again = plan(gpus=(), layout="Qwen3-8B", name="glm-4.1v-9b", ram_gib=ram_gib, prompt_cache_mib=0,
                     image_max_tokens=tokens)  # fmt: skip
        assert isinstance(again, Plan)
