"""Settings: the documented defaults are complete, and a message names each invalid key."""

import pytest

from llamafleet.cli.arguments import default_data
from llamafleet.settings.schema import Instance, Settings, SettingsError

MODEL = {"name": "gpt", "source": "hf:o/r/f.gguf", "port": 9001}


def problems(**changes):
    with pytest.raises(SettingsError) as caught:
        Settings.from_data({**default_data(), "models": [MODEL], **changes})
    return caught.value.problems


def instance_problems(**changes):
    return problems(models=[{**MODEL, **changes}])


def test_the_defaults_are_settings():
    settings = Settings.from_data(default_data())
    assert settings.models == ()
    assert settings.backend == "auto"


def test_the_defaults_name_every_setting_and_no_other():
    data = default_data()
    assert set(data) - {"model_defaults"} == set(Settings.__dataclass_fields__)
    assert set(data["model_defaults"]) | {"name", "source", "port"} == set(Instance.__dataclass_fields__)


def test_an_entry_overrides_the_model_defaults():
    settings = Settings.from_data({**default_data(), "models": [{**MODEL, "slots": 4, "kv_types": ["q8_0", "f16"]}]})
    [instance] = settings.models
    assert (instance.slots, instance.kv_types, instance.ubatch_tokens) == (4, ("q8_0", "f16"), None)
    assert instance.unit == "llama-server-gpt.service"


def test_what_belongs_to_pyinfra_is_left_alone():
    data = {**default_data(), "ssh_user": "root", "_sudo": True, "docker_container_id": "x"}
    assert Settings.from_data(data).models == ()


def test_an_unknown_key_is_named_with_the_nearest():
    assert problems(gpu_reserve_mb=1) == ["gpu_reserve_mb: unknown setting; did you mean `gpu_reserve_mib`?"]
    assert instance_problems(slot=1) == ["models[0].slot: unknown setting; did you mean `slots`?"]


def test_every_problem_is_told_at_once():
    messages = problems(backend="tpu", keep_releases=-1, ram_reserve_mib=-5)
    assert [line.split(":")[0] for line in messages] == ["backend", "keep_releases", "ram_reserve_mib"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("slots", True),
        ("slots", "2"),
        ("slots", 1.0),
        ("port", None),
        ("kv_types", "f16"),
        ("kv_types", [1]),
        ("threads", "all"),
        ("mirrors", "x"),
        ("name", 3),
    ],
)
def test_wrong_types_are_refused(key, value):
    [problem] = instance_problems(**{key: value})
    wrong = f"{key}[0]" if isinstance(value, list) else key
    assert problem.startswith(f"models[0].{wrong}: should be ")
    assert problem.endswith(f", is {value[0] if isinstance(value, list) else repr(value)}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "Bad Name"),
        ("name", "-x"),
        ("name", "../x"),
        ("source", "model.gguf"),
        ("listen", ""),
        ("listen", "localhost"),
        ("listen", "-127.0.0.1"),
        ("listen", "fe80::1%eth0\nExecStartPre=/bin/sh"),
        ("port", 0),
        ("port", 70000),
        ("context_tokens", 1),
        ("slots", 0),
        ("slots", 257),
        ("kv_types", ["q3_k"]),
        ("kv_types", []),
        ("sha256", "abc"),
    ],
)
def test_implausible_values_are_refused(key, value):
    [problem] = instance_problems(**{key: value})
    wrong = f"{key}[0]" if isinstance(value, list) and value else key
    assert problem.startswith(f"models[0].{wrong}: should ")


def test_names_and_ports_are_used_once():
    messages = problems(models=[MODEL, {**MODEL, "source": "/x.gguf"}])
    assert messages == ["models[1].name: 'gpt' is used twice", "models[1].port: 9001 is already the port of 'gpt'"]


def test_missing_keys_are_told():
    assert problems(models=[{"name": "a", "port": 1}]) == ["models[0].source: missing; the entry must give it"]
    data = default_data()
    del data["backend"]
    with pytest.raises(SettingsError, match=r"backend: missing; inventory/group_data/all.py must give it"):
        Settings.from_data(data)


@pytest.mark.parametrize("models", [3, {"a": 1}, "hf:o/r/f.gguf", None])
def test_models_is_a_list(models):
    assert problems(models=models)[0].startswith("models: should be a list of dictionaries")


@pytest.mark.parametrize(
    ("key", "value"),
    [("build_cache", "builds"), ("hub_endpoint", "huggingface.co"), ("model_defaults", ["slots"]), ("build_jobs", 0)],
)
def test_unusable_settings_of_a_host_are_named(key, value):
    [problem] = problems(**{key: value})
    assert problem.startswith(f"{key}: should ") and repr(value) in problem


def test_an_entry_is_a_dictionary():
    assert problems(models=["hf:o/r/f.gguf"]) == ["models[0]: should be a dictionary, is 'hf:o/r/f.gguf'"]


def test_unset_is_not_empty():
    assert Settings.from_data({**default_data(), "models": [MODEL]}).models[0].context_tokens is None
    assert instance_problems(context_tokens=0) == [
        "models[0].context_tokens: should be a whole number from 256 to 2147483647 or None, is 0"
    ]


def test_an_address_that_others_reach_needs_a_key_or_the_word():
    for address in ("0.0.0.0", "::", "10.0.0.7", "fd00::7"):
        [problem] = instance_problems(listen=address)
        assert problem.startswith("models[0].listen: ") and address in problem and "allow_unauthenticated" in problem
        for guard in ({"api_key_file": "/keys"}, {"allow_unauthenticated": True}):
            assert Settings.from_data({**default_data(), "models": [{**MODEL, "listen": address, **guard}]})
    for address in ("127.0.0.1", "127.0.1.9", "::1"):
        assert Settings.from_data({**default_data(), "models": [{**MODEL, "listen": address}]})


def test_certificate_and_key_are_given_together():
    assert instance_problems(tls_key_file="/k")[0].startswith("models[0].tls_certificate_file: missing")
    assert instance_problems(tls_certificate_file="/c")[0].startswith("models[0].tls_key_file: missing")


def test_flags_that_open_the_host_are_refused_unless_asked_by_name():
    [problem] = instance_problems(extra_flags=["--temp 0.2", "--tools all"])
    assert problem.startswith("models[0].extra_flags: --tools lets") and "dangerous_flags" in problem
    [problem] = instance_problems(dangerous_flags=["--tools read_file"])
    assert "give an api_key_file too" in problem
    entry = {**MODEL, "dangerous_flags": ["--tools read_file"], "api_key_file": "/keys"}
    assert Settings.from_data({**default_data(), "models": [entry]})


@pytest.mark.parametrize(
    ("key", "path"),
    [("a\nb", "'a\\nb': unknown setting; known are models, "), ("", "'': unknown setting"), ("k" * 9999, "'kkk"),
     ("\ud800", "settings: should have a string as keys, has '\\ud800'"), (3, "settings: should have a string as keys")],
)  # fmt: skip
def test_odd_keys_are_named_in_one_line(key, path):
    with pytest.raises(SettingsError) as caught:
        Settings.from_data({**default_data(), key: 1})
    [problem] = caught.value.problems
    assert problem.startswith(path) and problem.isprintable() and len(problem) < 600


@pytest.mark.parametrize(
    "client", ["10.0.0.0/33", "10.0.0.7/8", "example.com", "", "10.0.0.1 any", "fe80::1%eth0", "any", 5]
)
def test_clients_are_addresses_and_networks(client):
    [problem] = problems(models=[{**MODEL, "allowed_clients": [client]}])
    assert problem.startswith("models[0].allowed_clients[0]: should be ")


def test_clients_may_be_of_both_families():
    clients = ["10.0.0.7", "10.0.0.0/8", "fd00:1::/64", "0.0.0.0/0"]
    assert (
        Settings.from_data({**default_data(), "models": [{**MODEL, "allowed_clients": clients}]})
        .models[0]
        .allowed_clients
    )
