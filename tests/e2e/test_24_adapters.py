"""A LoRA adapter and the operator's own files beside a model, on a host that has presets and variables of llama.cpp."""

import json
import re

import pytest

from sandbox import adapters
from tests.e2e.deploying import ask, main_pid, on, pyinfra, serves, shipped_checks

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}REPLY:\n"
FOLDER = "/etc/llamafleet/instances/tiny"
# A preset that no server starts with, and variables that would change the context, the address and the keys.
PRESET = "[*]\nctx-size = 256\nalias = planted\nlora = /nowhere.gguf\n"
VARIABLES = (
    "LLAMA_ARG_CTX_SIZE=256",
    "LLAMA_ARG_N_PARALLEL=3",
    "LLAMA_ARG_JINJA=0",
    "LLAMA_API_KEY=planted",
    "AIP_MODE=PREDICTION",
)


@pytest.fixture(scope="module")
def host(deployed):
    return deployed[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "schema.json").write_text(
        '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    )
    adapters.lora(folder, "dense", seed=1, rank=4, name="one")
    adapters.lora(folder, "dense", seed=2, rank=8, name="two")
    adapters.lora(folder, "moe", seed=1, name="other")
    return folder


@pytest.fixture
def wanted(settings, inventory, host, files):
    """The inventory with both adapters and the files; `changes` are of the model."""

    def make(**changes):
        model = {
            "adapters": [str(files / "one.gguf"), {"source": str(files / "two.gguf"), "scale": 0}],
            "chat_template_file": str(files / "template.jinja"), "json_schema_file": str(files / "schema.json"), **changes,
        }  # fmt: skip
        return inventory((host, settings(host, model=model)))

    return make


@pytest.fixture(scope="module")
def planted(host):
    """What somebody else set up on the host for llama.cpp."""
    on(host, "sh", "-c", f"mkdir -p /etc/llama.cpp && printf '%s' '{PRESET}' >/etc/llama.cpp/config.ini")
    on(host, "systemctl", "set-environment", *VARIABLES)
    yield
    on(host, "systemctl", "unset-environment", *(one.partition("=")[0] for one in VARIABLES))
    on(host, "rm", "-r", "/etc/llama.cpp")


def prompt(host):
    return ask(host, "/apply-template", {"messages": [{"role": "user", "content": "Hi"}]})[1]["prompt"]


def first(host, *scales):
    body = {"prompt": "Once", "n_predict": 1, "n_probs": 3, "temperature": 0, "cache_prompt": False, "grammar": 'root ::= [^"]*',
            **({"lora": [{"id": number, "scale": scale} for number, scale in enumerate(scales)]} if scales else {})}  # fmt: skip
    status, answer = ask(host, "/completion", body)
    assert status == 200, answer
    return [one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]]


@pytest.mark.usefixtures("planted")
def test_adapters_and_files_are_deployed_and_nothing_is_inherited(host, wanted):
    run = pyinfra(wanted())
    assert run.code == 0, run.text
    status, listed = ask(host, "/lora-adapters")
    assert [(one["path"].rpartition("/")[2], one["scale"]) for one in json.loads(listed)] == [
        ("one.gguf", 1),
        ("two.gguf", 0),
    ]
    assert first(host) == first(host, 1, 0) != first(host, 0, 0) != first(host, 0, 1)
    assert prompt(host) == "[user]Hi\nREPLY:"
    status, answer = ask(host, "/v1/completions", {"prompt": "a", "max_tokens": 60, "temperature": 0})
    assert status == 200 and re.match(r'\s*\{\s*"a"\s*:', answer["choices"][0]["text"]), answer
    _, props = ask(host, "/props")
    assert (props["default_generation_settings"]["n_ctx"], props["total_slots"], props["model_alias"]) == (
        1024,
        1,
        "tiny",
    )
    variables = on(host, "sh", "-c", f"tr '\\0' '\\n' </proc/{main_pid(host, 'tiny')}/environ | cut -d= -f1").split()
    assert "XDG_CONFIG_HOME" in variables and not [name for name in variables if name.startswith(("LLAMA_", "AIP_"))]


@pytest.mark.usefixtures("planted")
def test_a_second_run_changes_nothing(host, wanted):
    written, pid = wanted(), main_pid(host, "tiny")
    run = pyinfra(written)
    assert run.code == 0 and run.changed(host.name) == [] and main_pid(host, "tiny") == pid, run.text


@pytest.mark.long
@pytest.mark.usefixtures("planted")
def test_the_shipped_checks_pass(host, wanted):
    done = shipped_checks(wanted())
    assert done.returncode == 0, done.stdout[-4000:]


def test_an_edited_file_is_mended_while_the_server_runs_on_and_another_text_is_shown_and_served(host, wanted, files):
    pid = main_pid(host, "tiny")
    on(host, "sh", "-c", f"echo x >>{FOLDER}/chat-template; rm {FOLDER}/json-schema")
    run = pyinfra(wanted())
    assert run.code == 0 and "its chat template differs" in run.text and main_pid(host, "tiny") == pid, run.text
    assert on(host, "cat", f"{FOLDER}/chat-template") == TEMPLATE.strip()
    (files / "template.jinja").write_text(TEMPLATE.replace("REPLY", "ANSWER"))
    dry = pyinfra(wanted(), "--dry", "--diff")
    assert "-{% endfor %}REPLY:" in dry.text and "+{% endfor %}ANSWER:" in dry.text, dry.text
    run = pyinfra(wanted())
    assert run.code == 0 and main_pid(host, "tiny") != pid and prompt(host) == "[user]Hi\nANSWER:", run.text


@pytest.mark.long
def test_a_template_that_is_none_and_an_adapter_of_another_model_leave_what_serves(host, wanted, files):
    dry = pyinfra(wanted(adapters=[str(files / "other.gguf")]), "--dry")
    assert dry.code != 0 and "adapters[0]: other: it " in dry.text, dry.text
    (files / "template.jinja").write_text("{% for m in messages %}")
    run = pyinfra(wanted())
    assert run.code != 0, run.text
    assert prompt(host) == "[user]Hi\nANSWER:" and serves(host)
    assert "REPLY" not in on(host, "cat", f"{FOLDER}/chat-template")
