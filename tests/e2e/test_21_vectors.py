"""Servers of embeddings and of scores: deployed, asked by a real client and by the shipped checks; one that makes the same
vector of every text, and one that ranks an example wrongly, are put back."""

import json
import shutil

import gguf
import openai
import pytest

from sandbox import models
from tests.e2e import deploying
from tests.e2e.deploying import ask, main_pid, on, pyinfra, serves, shipped_checks

EMBEDDER, RERANKER = 8081, 8082
TEXTS = ["The weather is fine.", "It rains in Rome."]
QUERY = "Where does it rain?"


@pytest.fixture(scope="module")
def host(deployed):
    return deployed[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    sound = models.tiny(folder, "embedder")
    models.tiny(folder, "reranker")
    flat = folder / "flat.gguf"
    shutil.copy(sound, flat)
    for tensor in gguf.GGUFReader(flat, "r+").tensors:
        if tensor.name in ("token_embd.weight", "position_embd.weight"):
            tensor.data[:] = 0  # every token, at every place, is the same
    return {"embedder": sound, "reranker": folder / "tiny-reranker-F16.gguf", "flat": flat}


@pytest.fixture
def wanted(settings, inventory, host, files):
    """The inventory with a chat server, an embedder and a reranker; `example` is the reranker's."""

    def make(embedder="embedder", example=None):
        data = settings(host)
        [chat] = data["models"]
        common = {"listen": host.address, "threads": 1}
        data["models"] = [
            chat,
            {"name": "vectors", "source": str(files[embedder]), "port": EMBEDDER, "serves": "embedding", **common},
            {"name": "scores", "source": str(files["reranker"]), "port": RERANKER, "serves": "reranking", "slots": 2,
             "rerank_example": example, **common},
        ]  # fmt: skip
        return inventory((host, data))

    return make


@pytest.fixture(scope="module", autouse=True)
def left_as_found(host, outside, tmp_path_factory):
    """Later tests find the host as it was: with its chat server alone."""
    yield
    path, data = tmp_path_factory.mktemp("plain") / "inventory.py", deploying.settings(outside, host)
    done = pyinfra(deploying.write_inventory(path, [(host, data)]))
    assert done.code == 0, done.text


def embedded(host, texts=TEXTS):
    client = openai.OpenAI(base_url=f"http://{host.address}:{EMBEDDER}/v1", api_key="none", max_retries=0)
    return [one.embedding for one in client.embeddings.create(model="vectors", input=texts).data]


def scored(host, documents=TEXTS):
    status, answer = ask(host, "/v1/rerank", {"query": QUERY, "documents": documents}, port=RERANKER)
    assert status == 200, answer
    found = {one["index"]: one["relevance_score"] for one in answer["results"]}
    return [found[number] for number in range(len(documents))]


def test_an_embedder_and_a_reranker_serve_beside_a_chat(host, wanted):
    run = pyinfra(wanted())
    assert run.code == 0, run.text
    assert serves(host)
    one, other = embedded(host)
    assert len(one) == 128 and sum(value * value for value in one) == pytest.approx(1, abs=1e-3)
    assert one != other and embedded(host)[0] == pytest.approx(one, abs=1e-4)
    first, second = scored(host)
    assert first != second
    plan = json.loads(on(host, "cat", "/etc/llamafleet/instances/vectors/plan.json"))
    assert plan["gate"]["serves"] == "embedding" and plan["gate"]["vector_elements"] == 128
    record = json.loads(on(host, "cat", "/var/lib/llamafleet/gate/vectors.json"))
    names = [check["name"] for check in record["checks"]]
    assert names == ["health", "process", "context", "embedding", "speed", "longest input"] and record["read_speeds"], (
        record
    )
    assert "/v1/embeddings" in run.text and "/v1/rerank" in run.text
    # The longest input that it takes, and one token more.
    status, told = ask(host, "/v1/embeddings", {"input": "a " * 510}, port=EMBEDDER)
    assert status == 200, told
    status, told = ask(host, "/v1/embeddings", {"input": "a " * 511}, port=EMBEDDER)
    assert status >= 400 and "too large" in str(told), told


def test_a_second_run_changes_nothing(host, wanted):
    written, pids = wanted(), [main_pid(host, name) for name in ("vectors", "scores")]
    run = pyinfra(written)
    assert run.code == 0 and run.changed(host.name) == [], run.text
    assert pids == [main_pid(host, name) for name in ("vectors", "scores")]
    for name in ("vectors", "scores"):  # each asks for a vector or a score
        plan = f"/etc/llamafleet/instances/{name}/plan.json"
        assert on(host, "python3", "/opt/llamafleet/helpers/current/liveness.py", plan, "60") == ""


@pytest.mark.long
def test_the_shipped_checks_pass(host, wanted):
    done = shipped_checks(wanted())
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.long
def test_what_embeds_all_texts_alike_or_ranks_wrongly_is_put_back(host, wanted):
    before = embedded(host)
    run = pyinfra(wanted("flat"))
    assert run.code != 0 and "another vector for another text" in run.text, run.text
    assert embedded(host) == [pytest.approx(one, abs=1e-4) for one in before]
    ranked = sorted(zip(scored(host), TEXTS, strict=True))
    wrong = {"query": QUERY, "relevant": ranked[0][1], "irrelevant": ranked[1][1]}
    run = pyinfra(wanted(example=wrong))
    assert run.code != 0 and "rerank_example" in run.text, run.text
    assert scored(host) == [
        pytest.approx(score, abs=1e-3) for score, _ in sorted(ranked, key=lambda one: TEXTS.index(one[1]))
    ]
