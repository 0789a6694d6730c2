"""What a host is told of a command line: how to try it, and how much it computes in one piece."""

import json
from pathlib import Path

import pytest

from llamafleet.service.trial import MODEL, PORT, batch_tokens, measured, told_to_host, trial
from tests.service.test_unit import made

REMOTE = Path(__file__).parents[2] / "llamafleet" / "remote"


def value(words, flag):
    return words[words.index(flag) + 1]


def test_a_trial_has_the_plan_s_devices_and_types_and_nothing_of_the_real_model():
    _, record, argv = made([24564])
    found = record["trial"]
    assert found["devices"] == ["CUDA0"] and found["list_devices"] == [argv[0], "--list-devices"]
    for flag in ("--device", "--cache-type-k", "--cache-type-v", "--flash-attn", "--load-mode", "--fit"):
        assert value(found["serve"], flag) == value(argv, flag)
    assert (value(found["serve"], "--model"), value(found["serve"], "--port")) == (MODEL, PORT)
    assert value(found["serve"], "--n-gpu-layers") == "99" and value(found["serve"], "--ctx-size") == "256"


def test_without_a_gpu_no_device_has_to_be_listed():
    found = made([])[1]["trial"]
    assert found["devices"] == [] and value(found["serve"], "--n-gpu-layers") == "0"


@pytest.mark.parametrize(("listen", "host"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("10.0.0.5", "127.0.0.1")])
def test_it_is_tried_on_the_loopback_of_its_address_family(listen, host):
    found = trial(["x", "--host", listen])
    assert found["host"] == value(found["serve"], "--host") == host


KEYS = "/run/credentials/llama-server-chat.service"


def test_what_is_measured_is_the_service_s_command_line_without_keys_at_an_address_of_its_own():
    argv = made([24564])[2]
    found = measured([*argv, "--api-key-file", f"{KEYS}/api-keys", "--ssl-cert-file", f"{KEYS}/tls-certificate",
                      "--ssl-key-file", f"{KEYS}/tls-key", "--ui"], has_text=True)  # fmt: skip
    at = {argv.index("--host") + 1: "{host}", argv.index("--port") + 1: "{port}"}
    assert found == {"host": "127.0.0.1", "argv": [*(at.get(n, word) for n, word in enumerate(argv)), "--ui"]}


def test_a_server_on_demand_is_measured_at_a_path_and_ipv6_at_its_loopback():
    assert measured(["x", "--host", "/run/llama-server-a/http.sock", "--port", "8080"], False)["argv"] == [
        "x", "--host", "{socket}", "--port", "{port}"
    ]  # fmt: skip
    assert measured(["x", "--host", "fe80::1%eth0", "--port", "1"], False)["host"] == "::1"


@pytest.mark.parametrize("has_text", [True, False])
def test_a_chat_template_is_measured_and_a_grammar_where_the_prompts_are_real(has_text):
    texts = ["--chat-template-file", f"{KEYS}/chat-template", "--grammar-file", f"{KEYS}/grammar"]
    found = measured(["x", "--host", "127.0.0.1", "--port", "1", *texts], has_text)["argv"][5:]
    assert found[:2] == ["--chat-template-file", "{credentials}/chat-template"]
    assert found[2:] == (["--grammar-file", "{credentials}/grammar"] if has_text else [])


def test_a_batch_is_never_longer_than_the_context():
    assert batch_tokens(["x", "--ctx-size", "8192", "--batch-size", "2048"]) == 2048
    assert batch_tokens(["x", "--ctx-size", "1024", "--batch-size", "2048"]) == 1024
    record = made([24564])[1]
    assert record["batch_tokens"] == batch_tokens(record["gate"]["argv"])


def test_what_the_host_is_told_does_not_change_the_identity(monkeypatch):
    from llamafleet.service import record

    before = made([24564])
    monkeypatch.setattr(record, "told_to_host", lambda argv, alone: {})
    after = made([24564])
    assert after[1]["identity"] == before[1]["identity"] and after[0] == before[0]
    assert "trial" in before[1] and "trial" not in after[1]
    assert json.loads(json.dumps(before[1]["trial"])) == before[1]["trial"]


def test_no_program_on_a_host_names_a_flag_that_the_plan_decides():
    from llamafleet.settings.extra_flags import OWN_PLACE, PLANNED

    # That a server may sleep, the liveness check reads from the running process: a drop-in may have said it, too.
    flags = {*PLANNED, *OWN_PLACE, "--tensor-split"} - {"--source", "--sleep-idle-seconds"}
    found = {(path.name, flag) for path in REMOTE.glob("*.py") for flag in flags if f'"{flag}"' in path.read_text()}
    assert found == set()
    assert told_to_host(["x", "--ctx-size", "1", "--batch-size", "1"], True)["trial"]["serve"][0] == "x"
