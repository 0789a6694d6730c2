"""Embedders and rerankers of published numbers, planned and then asked of llama-server with the plan's own flags; and a
served one: what a long input takes, and what the gate and the liveness check see of it."""

import dataclasses
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from time import monotonic, sleep

import gguf
import openai
import psutil
import pytest

from bench.outline_cases import OUTLINES, compared, is_right, situations
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import output_bytes
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from llamafleet.model.shape import Shape
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan
from llamafleet.remote import gate, gate_scores, liveness, liveness_server
from sandbox import models, oracle, outlines
from sandbox.embedders import EMBEDDERS, RERANKERS, TINY
from tests.planning import MIB, machine, settings

pytestmark = pytest.mark.oracle

PUBLISHED = {**EMBEDDERS, **RERANKERS}
# Other sizes of what is asked about anyway.
ALIKE = ("bge-small-en-v1.5", "bge-large-en-v1.5", "Qwen3-Embedding-4B", "Qwen3-Embedding-8B", "Qwen3-Reranker-4B")
# A GPU for all of it, two that share it as a pipeline, none. One prompt cache of each model's whole context fits there.
MACHINES = {"a GPU": [49140], "two GPUs": [8192, 8192], "no GPU": []}
ROUNDING_MIB = 0.02  # as in bench/outline_cases.py


def plan_of(path, layout, gpus, **instance):
    serves = "reranking" if layout.name in RERANKERS else "embedding"
    wanted = settings({"serves": serves, **instance}, ram_reserve_mib=0)
    [result] = plan_host(machine(gpus, ram_gib=128), [(wanted.models[0], read_path(path))], wanted)
    assert isinstance(result, Plan), result
    return result


def asked(path, plan):
    flags = [word.replace("CUDA", "RPC") for word in plan.argv]
    at = flags.index("--fit")
    return oracle.ask(path, [*flags[:at], *flags[at + 2 :]], len(plan.gpus))


def differences(path, layout, gpus, **instance):
    plan = plan_of(path, layout, gpus, **instance)
    told = asked(path, plan)
    for row, device in zip(told.devices, plan.ledger[:-1], strict=True):
        ours = (device.weights_bytes // MIB, device.kv_bytes // MIB)
        if ours != (row.model, row.context) or abs(device.compute_bytes / MIB - told.buffers[row.name]) > ROUNDING_MIB:
            yield f"{layout.name} {device}: {row}, {told.buffers}"
    if not plan.gpus:
        host = plan.ledger[-1]
        parts = (host.weights_bytes // MIB, host.kv_bytes // MIB)
        close = abs(parts[0] - told.host.model - told.repacked) <= 1  # two figures, each rounded down
        if (
            not close
            or parts[1] != told.host.context
            or abs(host.compute_bytes / MIB - told.buffers["CPU"]) > ROUNDING_MIB
        ):
            yield f"{layout.name} {host}: {told}"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in ALIKE else ()) for name in PUBLISHED]
)
def test_llama_server_allocates_what_the_plan_says(name, tmp_path):
    layout = PUBLISHED[name]
    path = models.weightless(tmp_path, layout)
    # 8192 tokens of bge-m3 have logits of 8 GB, which nobody asks of a test's machine.
    cases = [(gpus, {"context_tokens": min(layout.context, 2048)}) for gpus in MACHINES.values()]
    cases += [([49140], {"context_tokens": 512, "slots": 3})]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda case: list(differences(path, layout, case[0], **case[1])), cases)
        assert [one for some in found for one in some] == []


@pytest.mark.parametrize("name", ["gemma4", "granitehybrid", "lfm2", "qwen3vl"])
def test_any_model_that_writes_can_make_vectors(name, tmp_path):
    """The logits of all tokens are computed: rows are chosen early or late, and devices may form a pipeline."""
    path = outlines.weightless(OUTLINES / f"{name}.yaml", tmp_path)
    model = Model.of(read_path(path))
    for situation in ("one device, four slots with caches of their own", "two devices"):
        context, *rest = situations(model.layers)[situation]
        figures = list(compared(path, model, (context.pooled("mean"), *rest)))
        assert len(figures) >= 6 and [one for one in figures if not is_right(one[1], one[2], one[3], {})] == []


def test_a_long_input_takes_the_memory_that_is_planned_for_results(tmp_path):
    """llama.cpp makes room for the logits of every token of an input, and fills it with zeros."""
    layout = dataclasses.replace(TINY["embedder"], name="tiny-embedder-wide", vocab=60000, context=2048)
    path = models.make(layout, tmp_path, seed=1)
    with served(path, tmp_path, "--embedding", "--pooling", "mean", size=2048) as url:
        embed(url, "a")
        before = memory_of(url)
        embed(url, "a " * 2000)
        grown = memory_of(url) - before
    planned = output_bytes(Shape.of(read_path(path)), Context(2048, 1, "f16", 2048, pooling="mean"))
    assert planned > 450 * MIB
    assert 0.9 * planned < grown < 1.1 * planned


def served(path, folder, *flags, size=512, slots=1):
    port = oracle.free_port()
    command = [oracle.build().llama_server, "--model", path, "--port", port, "--ctx-size", size * slots, "--parallel",
               slots, "--batch-size", size, "--ubatch-size", size, "--threads", "1", "--threads-batch", "1", "--fit",
               "off", "--slots", "--metrics", "--no-ui", "--offline", *flags]  # fmt: skip
    return oracle.serving([str(word) for word in command], port, folder / "log")


def memory_of(url):
    port = int(url.rsplit(":", 1)[1])
    [pid] = {one.pid for one in psutil.Process().children() for two in one.net_connections() if two.laddr.port == port}
    return psutil.Process(pid).memory_info().rss


def embed(url, text):
    request = urllib.request.Request(f"{url}/v1/embeddings", json.dumps({"input": text}).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"][0]["embedding"]


def embed_until(over, url, text):
    """The vectors of one text after another, until the event."""
    vectors = []
    while not over.is_set():
        vectors.append(embed(url, text))
    return vectors


# By the test model: flags, and what plan.json's gate says.
SERVED = {
    "embedder": (["--embedding", "--pooling", "mean"], {"serves": "embedding", "pooling": "mean"}),
    "decoder-embedder": (["--embedding", "--pooling", "last"], {"serves": "embedding", "pooling": "last"}),
    "a vector for each token": (["--embedding", "--pooling", "none"], {"serves": "embedding", "pooling": "none"}),
    "reranker": (["--rerank"], {"serves": "reranking", "pooling": ""}),
}


def spec_of(url, told):
    return {
        "url": url, "api_keys": None, "context_tokens": 512, "slots": 2, "kv_type": None, "unit": "", "files": [],
        "argv": ["llama-server"], "gpus": [], "speed_floor_percent": 40, "predicted_tokens_per_s": 1.0, "last": {},
        "measured": {}, "record": "/g/tiny.json", "vector_elements": 128, "rerank_example": None, "may_sleep": False,
        "deploying": True,
        **told,
    }  # fmt: skip


@pytest.mark.parametrize("case", SERVED)
def test_the_gate_and_the_liveness_check_call_a_sound_server_sound(case, tmp_path, monkeypatch):
    flags, told = SERVED[case]
    monkeypatch.setattr(gate, "kv_types", lambda unit: [])
    path = models.tiny(tmp_path, case if case in TINY else "embedder")
    with served(path, tmp_path, *flags, slots=2) as url:
        spec = spec_of(url, told)
        asked = (gate.check_context, gate.check_completion, gate.check_speed, gate.check_embedding, gate.check_scores,
                 gate.check_reading, gate.check_longest)  # fmt: skip
        found = [one for one in (check(spec) for check in asked) if one is not None]
        assert all(one["ok"] for one in found), found
        own = "scores" if case == "reranker" else "embedding"
        assert [one["name"] for one in found] == ["context", own, "speed", "longest input"]
        assert found[-1]["found"].startswith("an answer to ")
        assert spec["measured"]["read_tokens_per_s"] > 10
        before, _ = liveness_server.read_slots(spec)
        # No prompt is kept, so that its own small request costs nobody anything; and it moves the counters.
        assert liveness.look(spec, {}, 5.0)[0] is None
        after, _ = liveness_server.read_slots(spec)
        assert liveness.moved(before, after, in_steps=False)


def test_a_busy_server_of_vectors_is_not_taken_for_a_wedged_one(tmp_path):
    """An input is one batch: whenever its slot is looked at, nothing of it is read yet, and another task is there."""
    path = models.tiny(tmp_path, "embedder")
    with served(path, tmp_path, "--embedding", "--pooling", "mean") as url, ThreadPoolExecutor(3) as pool:
        spec = spec_of(url, SERVED["embedder"][1])
        over = Event()
        load = [pool.submit(embed_until, over, url, "a " * 500) for _ in range(3)]
        working = []
        try:
            deadline = monotonic() + 60
            while len(working) < 8:
                assert monotonic() < deadline, working
                look = liveness_server.read_slots(spec)[0]
                working += [look] if any(at_work for _, at_work, _, _ in look.values()) else []
                sleep(0.05)
        finally:
            over.set()
        assert all(liveness.moved(working[0], later, in_steps=False) for later in working[-3:])
        assert all(len(vector) == 128 for one in load for vector in one.result())


def test_a_file_that_makes_one_vector_of_all_texts_is_found(tmp_path):
    path = models.tiny(tmp_path, "embedder")
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name in ("token_embd.weight", "position_embd.weight"):
            tensor.data[:] = 0
    with served(path, tmp_path, "--embedding", "--pooling", "mean") as url:
        found = gate.check_embedding(spec_of(url, SERVED["embedder"][1]))
    assert not found["ok"] and found["expected"] == "another vector for another text"


def test_an_example_is_ranked_as_the_server_does_it(tmp_path):
    texts = ["The weather is fine.", "It rains in Rome."]
    with served(models.tiny(tmp_path, "reranker"), tmp_path, "--rerank", slots=2) as url:
        spec = spec_of(url, SERVED["reranker"][1])
        ranked = sorted(zip(gate_scores.scored(spec, "Where does it rain?", texts), texts, strict=True))
        (_, low), (_, high) = ranked
        for relevant, irrelevant, good in ((high, low, True), (low, high, False)):
            example = {"query": "Where does it rain?", "relevant": relevant, "irrelevant": irrelevant}
            assert gate.check_scores({**spec, "rerank_example": example})["ok"] is good


def test_a_client_of_openai_gets_vectors(tmp_path):
    with served(models.tiny(tmp_path, "decoder-embedder"), tmp_path, "--embedding", "--pooling", "last") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.embeddings.create(model="tiny", input=["a", "b", "a"])
    one, other, again = (row.embedding for row in answer.data)
    assert len(one) == 128 and one == pytest.approx(again, abs=1e-4) and one != other
