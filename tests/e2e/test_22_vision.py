"""A projector beside a model: deployed, shown a picture, checked; one of another model, and one that computes garbage."""

import base64
import json

import openai
import pytest

from llamafleet.remote import gate_picture
from sandbox import models, projectors
from tests.e2e.deploying import PORT, ask, main_pid, on, pyinfra, serves, shipped_checks

REPOSITORY = "llamafleet/tiny-vision-GGUF"
WIDTH = 256  # of the model's embeddings


@pytest.fixture(scope="module")
def host(deployed):
    return deployed[0]


@pytest.fixture(scope="module")
def sources(outside, tmp_path_factory):
    """The model's source, and those of projectors: of this model, of another one, and one that computes no numbers."""
    folder = tmp_path_factory.mktemp("vision")
    files = {
        "model": models.tiny(folder, "windowed"),
        "good": projectors.tiny(folder, WIDTH, name="good"),
        "other": projectors.tiny(folder, WIDTH // 2, name="other"),
        "broken": projectors.tiny(folder, WIDTH, name="broken", is_broken=True),
    }
    # "auto" finds one beside the model; the others are in a folder that it does not look at.
    outside.hub.add(REPOSITORY, files["model"].name, files["model"])
    outside.hub.add(REPOSITORY, files["good"].name, files["good"])
    for name in ("other", "broken"):
        outside.hub.add(REPOSITORY, f"{name}/{files[name].name}", files[name])
    found = {name: f"hf:{REPOSITORY}/{name}/{files[name].name}" for name in ("other", "broken")}
    return {**found, "model": f"hf:{REPOSITORY}/{files['model'].name}", "auto": "auto"}


@pytest.fixture
def wanted(settings, inventory, host, sources):
    """The inventory with this projector."""

    def make(projector):
        return inventory((host, settings(host, model={"source": sources["model"], "projector": sources[projector]})))

    return make


def asked(host, picture):
    """The reply of the `openai` client's chat about a picture, with its log-probabilities."""
    data = base64.b64encode(picture).decode()
    client = openai.OpenAI(base_url=f"http://{host.address}:{PORT}/v1", api_key="none")
    message = {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        ],
    }
    return client.chat.completions.create(
        model="tiny", messages=[message], max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )


def test_a_model_with_the_projector_of_its_repository_sees(host, wanted):
    run = pyinfra(wanted("auto"))
    assert run.code == 0, run.text
    assert ask(host, "/props")[1]["modalities"] == {"vision": True, "audio": False, "video": True}
    record = json.loads(on(host, "cat", "/etc/llamafleet/instances/tiny/plan.json"))
    assert record["gate"]["modalities"] == ["vision"]
    assert [file["path"].rpartition("/")[2] for file in record["files"]][1:] == ["mmproj-good.gguf"]
    assert record["plan"]["ledger"][-1]["beside_bytes"] > 100 * 2**20  # of a picture on its way
    # llama-server told the projector's bytes, and the plan agreed.
    assert record["verified"]["rounds"] == 1
    told, planned = (record["verified"][name]["host"] for name in ("binary_bytes", "ledger_bytes"))
    assert abs(told - planned) < 4 * 2**20

    reply = asked(host, gate_picture.picture())
    assert reply.usage.prompt_tokens > 16 and reply.usage.completion_tokens == 4
    # It depends on what is in the picture.
    side, gate_picture.SIDE = gate_picture.SIDE, 48
    try:
        other = asked(host, gate_picture.picture())
    finally:
        gate_picture.SIDE = side
    assert likelihoods(reply) != likelihoods(other)


def likelihoods(reply):
    return [one.logprob for one in reply.choices[0].logprobs.content]


def test_a_second_run_changes_nothing(host, wanted):
    written, pid = wanted("auto"), main_pid(host, "tiny")
    run = pyinfra(written)
    assert run.code == 0 and run.changed(host.name) == [] and main_pid(host, "tiny") == pid, run.text


@pytest.mark.long
def test_the_shipped_checks_pass(host, wanted):
    done = shipped_checks(wanted())
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_projector_of_another_model_is_refused_and_nothing_is_downloaded(host, wanted):
    pid = main_pid(host, "tiny")
    run = pyinfra(wanted("other"))
    assert run.code != 0
    assert "makes embeddings of 128 numbers" in run.text and "takes 256: it is another model's" in run.text
    assert main_pid(host, "tiny") == pid and serves(host)
    assert on(host, "find", "/var/lib/llamafleet/models", "-name", "*other*") == ""


@pytest.mark.long
def test_a_projector_that_computes_garbage_is_turned_away_and_the_previous_one_serves(host, wanted):
    run = pyinfra(wanted("broken"))
    assert run.code != 0
    [told] = [line for line in run.text.splitlines() if "did not pass the gate" in line]
    assert "picture: expected finite likelihoods behind a picture" in told, told
    assert "the previous one was put back and serves" in told
    assert serves(host)
    argv = on(host, "sh", "-c", f"tr '\\0' ' ' </proc/{main_pid(host, 'tiny')}/cmdline")
    assert "mmproj-good.gguf" in argv
    assert asked(host, gate_picture.picture()).usage.completion_tokens == 4
