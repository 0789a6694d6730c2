"""Settings: the documented defaults are complete, and a message names each invalid key."""

import dataclasses
import re

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


@pytest.mark.parametrize("python", ["python3.11", "bin/python3", "", "/usr/bin/python3 -x", "/opt/a%b"])
def test_python_is_the_system_s_own_or_a_path(python):
    """It goes into units and commands."""
    [problem] = problems(python=python)
    assert problem.startswith("python: should be python3, or an absolute path such as /usr/bin/python3.11, is ")
    assert Settings.from_data({**default_data(), "python": "/opt/python/3.11/bin/python3"}).python.endswith("python3")


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
    hint = f": write [{value!r}]" if isinstance(value, str) and "list of strings" in problem else ""
    assert problem.endswith(f", is {value[0] if isinstance(value, list) else repr(value)}{hint}")


def test_a_word_for_a_list_is_shown_as_a_list():
    assert instance_problems(kv_types="f16, q8_0") == [
        "models[0].kv_types: should be a list of strings, is 'f16, q8_0': write ['f16', 'q8_0']"
    ]


def test_llama_cpp_s_own_words_are_known():
    [problem] = instance_problems(n_ctx=4096)
    assert problem == "models[0].n_ctx: unknown setting; it is `context_tokens` here"
    [problem] = instance_problems(n_gpu_layers=99)
    assert problem == "models[0].n_gpu_layers: unknown setting; the plan decides it"


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
        ("sha256", {"a": "b"}),
        ("sha256", "A" * 64),
        ("source", "hf:o"),
        ("source", "hf:o/r:"),
        ("source", "hf:o/f.gguf"),
        ("source", "hf:o/r/f.gguf@"),
        ("source", "hf:o/r/m;touch${IFS}x;.gguf"),
        ("source", "hf:o/r/a b.gguf@main"),
        ("source", "hf:o/r/f.gguf.zip"),
        ("source", "https://h/download"),
        ("source", "https://h/f(1).gguf?x=/y.gguf"),
        ("source", "https://h/a%20b.gguf"),
        ("source", "https://user:word@h/f.gguf"),
        ("source", "https://h:99999/f.gguf"),
        ("source", "http://[::1/f.gguf"),
        ("source", f"http://{'a' * 70}/f.gguf"),
        ("source", "https://h/" + "f" * 300 + ".gguf"),
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


@pytest.mark.parametrize("site", ["", "hall 1", "a/b", "x" * 64, 7])
def test_a_site_is_a_name(site):
    [problem] = problems(site=site)
    assert problem.startswith("site: should be ")
    assert Settings.from_data({**default_data(), "site": "Hall-1.b"}).site == "Hall-1.b"


def test_the_site_s_port_is_no_model_s():
    """Its server runs while services are switched."""
    [problem] = problems(site_port=9001)
    assert problem.startswith("site_port: 9001 is the port of gpt: give another one")
    assert Settings.from_data({**default_data(), "models": [MODEL], "site_port": 9001, "site": None}).site is None


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
    assert problem.startswith(path) and problem.isprintable() and len(problem) < 1200


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


@pytest.mark.parametrize(
    "source",
    [
        "hf:o/r/f.gguf",
        "hf:o/r/Q4/F.GGUF@v1",
        "hf:o/r",
        "hf:o/r:Q4_K_M@v1",
        "https://huggingface.co/o/r",
        "https://huggingface.co/o/r/blob/main/Q4%2Ff.gguf",
        "https://h/f.gguf?Signature=a%2Fb",
        "http://h:8080/a%20b/f.gguf",
        "/srv/my model",
    ],
)
def test_sources_that_people_have(source):
    assert Settings.from_data({**default_data(), "models": [{**MODEL, "source": source}]}).models[0].source == source


@pytest.mark.parametrize(
    "mirror", ["/srv/m.gguf", "ftp://h/m.gguf", "https://h:0/m.gguf", "https://a..b/m.gguf", "", "m.gguf"]
)
def test_a_mirror_is_an_address_that_hosts_can_ask(mirror):
    [problem] = instance_problems(mirrors=["hf:o/r/f.gguf", "https://h/download?id=7", mirror])
    assert problem.startswith("models[0].mirrors[2]: should be") and repr(mirror) in problem


def test_sums_are_one_or_a_list():
    one, two = "a" * 64, "b" * 64
    for given, kept in ((one, (one,)), ([one], (one,)), ([one, two], (one, two)), (None, None)):
        assert Settings.from_data({**default_data(), "models": [{**MODEL, "sha256": given}]}).models[0].sha256 == kept
    for given in ([], [one, "c"], [one, None], [[one]], 5):
        [problem] = instance_problems(sha256=given)
        assert problem.startswith("models[0].sha256: should be 64 lower-case hexadecimal digits, or a list of such")


def test_a_model_may_do_without_a_sum_by_its_own_entry_only():
    assert (
        Settings.from_data({**default_data(), "models": [{**MODEL, "allow_unverified": True}]})
        .models[0]
        .allow_unverified
    )
    defaults = {**default_data()["model_defaults"], "allow_unverified": True}
    assert problems(model_defaults=defaults) == [
        "model_defaults.allow_unverified: cannot be a default: give it in the entry of each model that may do without a "
        "known sha256"
    ]


@pytest.mark.parametrize("endpoint", ["http://hub.example", "http://10.0.0.7:8080", "http://127.0.0.1.example"])
def test_a_token_goes_over_https_or_to_this_machine(endpoint):
    [problem] = problems(hub_endpoint=endpoint, hub_token_file="/token")
    assert problem.startswith(
        f"hub_endpoint: '{endpoint}' is neither https nor this machine, so others could read the token"
    )
    assert Settings.from_data({**default_data(), "hub_endpoint": endpoint}).hub_token_file is None
    for safe in ("https://hub.example", "http://127.0.0.1:8080", "http://[::1]:80", "http://localhost"):
        assert Settings.from_data({**default_data(), "hub_endpoint": safe, "hub_token_file": "/token"})


@pytest.mark.parametrize(
    "key",
    [
        "build_jobs",
        "keep_releases",
        "gpu_reserve_mib",
        "ram_reserve_mib",
        "liveness_seconds",
        "liveness_interval_seconds",
    ],
)
@pytest.mark.parametrize("value", [10**400, 10**5000, -1], ids=["400 digits", "5000 digits", "negative"])
def test_numbers_of_any_length_are_refused_by_key(key, value):
    [problem] = problems(**{key: value})
    assert problem.startswith(f"{key}: should be ") and len(problem) < 250


@pytest.mark.parametrize("value", [10**400, -1, 1024])
def test_a_vulkan_device_is_a_small_number(value):
    [problem] = problems(vulkan_devices=[0, value])
    assert problem.startswith("vulkan_devices[1]: should be a whole number from 0 to 1023")


@pytest.mark.parametrize("text", ["/a\0b", "/a\nb", "/\x1b[2J", "/\x9b", "/\udcff"], ids=repr)
@pytest.mark.parametrize(
    "key", ["api_key_file", "tls_key_file", "source", "llama_cpp_ref", "build_cache", "hub_token_file"]
)
def test_no_text_has_control_characters(key, text):
    found = problems(**{key: text}) if key in Settings.__dataclass_fields__ else instance_problems(**{key: text})
    where = key if key in Settings.__dataclass_fields__ else f"models[0].{key}"
    assert any(line.startswith(f"{where}: should ") and line.isprintable() for line in found), found


def test_no_text_is_longer_than_an_argument():
    [problem] = instance_problems(api_key_file="k" * (2**17 + 1))
    assert problem == "models[0].api_key_file: should have at most 131072 characters, has 131073"


@pytest.mark.parametrize("name", ["nice", "../nice.conf", "a/b.conf", ".conf ", "", "nice.conf\n"])
def test_a_drop_in_is_named_by_its_file_alone(name):
    [problem] = instance_problems(allowed_drop_ins=["10-nice.conf", name])
    assert problem.startswith("models[0].allowed_drop_ins[1]: should ")


@pytest.mark.parametrize(("value", "write"), [("true", "True"), ("False", "False"), ("yes", "True"), ("no", "False")])
def test_a_flag_that_was_written_as_a_text_says_what_to_write(value, write):
    assert problems(allow_swap=value) == [f"allow_swap: should be True or False, is {value!r}: write {write}"]


@pytest.mark.parametrize(
    "value",
    [object(), 1.5, {"a": 1}, [object()], [1.5], [[]]],
    ids=["thing", "float", "map", "things", "floats", "lists"],
)
def test_every_message_of_a_wrong_type_is_a_sentence(value):
    """Of every key of the host and of a model: no article before a plural, and the key in front."""
    of_host = {one.name for one in dataclasses.fields(Settings)} - {"models"}
    of_model = {one.name for one in dataclasses.fields(Instance)}
    for key, found in [*((key, problems(**{key: value})) for key in sorted(of_host)),
                       *((key, instance_problems(**{key: value})) for key in sorted(of_model))]:  # fmt: skip
        assert found, key
        for text in found:
            assert re.match(rf"(models\[0\]\.)?{key}(\[0\]|\.\w+)*: (should|missing|unknown)", text), text
            assert not re.search(r"\b(a list of a|a strings|a whole numbers|an? an?)\b", text), text


@pytest.mark.parametrize("mirror", ["x", "/srv/m.gguf", "ftp://host/m.gguf", "hf:x", "hf:a/b"])
def test_a_mirror_is_an_address_of_a_file(mirror):
    [text] = instance_problems(mirrors=[mirror])
    assert text.startswith("models[0].mirrors[0]: should be") and text.endswith(f"is {mirror!r}")


def test_types_of_k_and_v_apart():
    entry = {**MODEL, "kv_types": ["q8_0/f16", "f16/f16", "bf16"]}
    [instance] = Settings.from_data({**default_data(), "models": [entry]}).models
    assert instance.kv_types == ("q8_0/f16", "f16", "bf16")


@pytest.mark.parametrize("kind", ["q8_0/", "/f16", "q8_0/f16/f16", "q8_0/q3_k", "f16 / f16", "Q8_0/f16"])
def test_a_type_that_is_none_is_named(kind):
    [problem] = instance_problems(kv_types=[kind])
    assert problem.startswith("models[0].kv_types[0]: should be one of f32, f16") and "two of them as K/V" in problem


def test_a_pool_is_what_slots_share():
    assert instance_problems(pool_tokens=8192) == [
        "models[0].pool_tokens: 8192 is the size of a pool, and each slot has a cache of its own: set kv_unified"
    ]
    assert instance_problems(pool_tokens=8192, kv_unified=True, context_tokens=16384) == [
        "models[0].context_tokens: 16384 is more than the pool that all slots share (pool_tokens 8192)"
    ]
    assert instance_problems(pool_tokens=8192, kv_unified=True, live_tokens=8193) == [
        "models[0].live_tokens: 8193 is more than the pool that all slots share (pool_tokens 8192)"
    ]
