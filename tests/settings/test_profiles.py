"""Named workloads: whose value counts, and that docs have the very values."""

import re
from hashlib import sha256
from pathlib import Path

import pytest

from llamafleet.planner import stability
from llamafleet.planner.result import Plan
from llamafleet.settings.defaults import MODEL_DEFAULTS, defaults
from llamafleet.settings.profiles import PROFILES
from llamafleet.settings.schema import Settings, SettingsError
from llamafleet.settings.workload import Workload
from tests import planning

CONTEXT = 65536
KEYS = ("prompt_tokens", "live_tokens", "reply_tokens", "concurrency")


def asked(entry, **model_defaults):
    """The four values of a model with this entry, and these of its group; each group has all defaults, as pyinfra's."""
    data = defaults()
    data[MODEL_DEFAULTS] |= model_defaults
    data["models"] = [{"name": "m", "source": "/m.gguf", "port": 9000, **entry}]
    [instance] = Settings.from_data(data).models
    return {key: getattr(Workload.of(instance, CONTEXT), key) for key in KEYS}


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_fills_what_is_not_set(name):
    assert asked({"profile": name}) == asked({}, profile=name) == dict(PROFILES[name])


def test_without_a_profile_the_defaults_stay():
    usual = {key: defaults()[MODEL_DEFAULTS][key] for key in KEYS}
    assert asked({}) == {**usual, "live_tokens": CONTEXT // 4}
    assert asked({"profile": None}, profile="batch") == asked({})


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_the_operator_set_comes_first(key):
    assert asked({"profile": "agent", key: 200}) == {**PROFILES["agent"], key: 200}
    assert asked({"profile": "agent"}, **{key: 200}) == {**PROFILES["agent"], key: 200}


def test_in_an_entry_the_default_counts_as_set():
    assert asked({"profile": "agent", "prompt_tokens": 2048}) == {**PROFILES["agent"], "prompt_tokens": 2048}


@pytest.mark.parametrize("name", ["agents", 5, ["chat"], ""])
def test_another_name_is_refused(name):
    with pytest.raises(SettingsError, match=r"models\[0\].profile: should be"):
        asked({"profile": name})


def test_a_cache_holds_at_least_the_prompt_that_was_set():
    assert asked({"profile": "chat", "prompt_tokens": 8192})["live_tokens"] == 8192 + 512 // 2


def test_a_profile_is_shortened_to_a_small_context():
    [instance] = planning.settings({"profile": "rag"}).models
    work = Workload.of(instance, 2048)
    assert work.prompt_tokens + work.reply_tokens == 2048 and work.live_tokens <= 2048


@pytest.mark.parametrize("shape", [{}, {"kv_unified": True, "pool_tokens": 16384}])
def test_a_context_smaller_than_the_profile_is_planned(shape):
    settings = planning.settings({"profile": "agent", "context_tokens": 8192, **shape}, backend="cpu")
    [plan] = planning.plans(planning.machine(), [("Qwen3-8B", "Q4_K_M")], settings)
    assert isinstance(plan, Plan) and any("with 8192 tokens in the KV cache" in one for one in plan.why)


def test_a_profile_changes_the_inputs_of_a_plan_and_none_does_not(monkeypatch):
    """Hosts that were deployed before there were profiles keep their key; a profile's `live_tokens` are in no field."""
    hashed = []
    monkeypatch.setattr(stability.hashlib, "sha256", lambda data: hashed.append(data) or sha256(data))

    def key(entry):
        settings = planning.settings(entry)
        return stability.inputs_key(planning.machine(), settings, settings.models[0], {})

    four = {name: value for name, value in PROFILES["agent"].items() if name != "live_tokens"}
    key({})
    assert len(hashed) == 1 and b'"profile"' not in hashed[0]
    assert key({}) == key({"profile": None}) != key({"profile": "agent"}) != key(four)


def test_the_plan_names_the_profile():
    settings = planning.settings({"profile": "batch", "context_tokens": 4096}, backend="cpu")
    [plan] = planning.plans(planning.machine(), [("Qwen3-8B", "Q4_K_M")], settings)
    assert any(one.startswith("the workload (profile batch): each request reads 1024 tokens and writes 128, 8 requests")
               for one in plan.why)  # fmt: skip


def test_docs_have_the_values():
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    rows = re.findall(r'^\| `"(\w+)"` \| [^|]+ \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$', text, re.MULTILINE)
    assert {name: dict(zip(KEYS, map(int, values), strict=True)) for name, *values in rows} == PROFILES
