"""Variables that an operator may give to servers, and those that are refused with the way out."""

from __future__ import annotations

import pytest

from llamafleet.settings.environment import assignment, gfx_targets, problems
from llamafleet.settings.schema import SettingsError
from tests import planning


def refusal(**variables):
    with pytest.raises(SettingsError) as error:
        planning.settings({}, environment=variables)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "HSA_OVERRIDE_GFX_VERSION",
        "HSA_OVERRIDE_GFX_VERSION_1",
        "GGML_CUDA_P2P",
        "OMP_NUM_THREADS",
        "TOKENIZERS_PARALLELISM",
    ],
)
def test_a_variable_that_nobody_sets_is_passed_on(name):
    value = "10.3.0"
    assert planning.settings({}, environment={name: value}).environment == {name: value}


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("CUDA_VISIBLE_DEVICES", "use the setting `gpus`"),
        ("ROCR_VISIBLE_DEVICES", "use the setting `gpus`"),
        ("GGML_VK_VISIBLE_DEVICES", "use the setting `gpus`"),
        ("GGML_CUDA_ENABLE_UNIFIED_MEMORY", "which the plan counts"),
        ("HOME", "a folder of its own"),
        ("NOTIFY_SOCKET", "systemd sets it"),
        ("LISTEN_FDS", "systemd sets it"),
        ("LLAMA_ARG_CTX_SIZE", "give the flag in extra_flags"),
        ("LD_PRELOAD", "/etc/ld.so.conf.d"),
        ("GGML_BACKEND_PATH", "than the release"),
        ("LLAMA_API_KEY", "api_key_file"),
        ("HF_TOKEN", "hub_token_file"),
        ("my_password", "everybody on the host may read a unit"),
    ],
)
def test_what_is_set_already_or_must_not_be_read_is_refused_with_the_way_out(name, way_out):
    text = refusal(**{name: "1"})
    assert text.startswith(f"environment.{name}: is refused: ") and way_out in text


def test_every_variable_that_a_plan_sets_is_refused():
    from llamafleet.host.backends import TRAITS

    ours = {"CUDA_DEVICE_ORDER", *(one.visible_variable for one in TRAITS.values() if one.visible_variable)}
    assert len(list(problems(dict.fromkeys(ours, "0")))) == len(ours) >= 4


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A=B", "Ä"])
def test_a_name_is_a_variable_s(name):
    assert "should be a variable's name" in refusal(**{name: "1"})


def test_a_value_has_no_control_characters():
    assert "environment.A: should have no control characters" in refusal(A="x\nExecStartPre=/bin/sh")


@pytest.mark.parametrize(
    ("value", "target"), [("10.3.0", "gfx1030"), ("11.0.1", "gfx1101"), ("9.0.10", "gfx90a"), ("9.4.2", "gfx942")]
)
def test_the_version_of_a_card_is_a_target_of_its_compiler(value, target):
    """ggml-org/llama.cpp#14421: a card that ROCm does not know is taken for another one."""
    assert gfx_targets({"HSA_OVERRIDE_GFX_VERSION": value}) == (target,)


def test_each_card_may_be_taken_for_another_one():
    several = {"HSA_OVERRIDE_GFX_VERSION_0": "10.3.0", "HSA_OVERRIDE_GFX_VERSION_1": "11.0.0", "A": "9.0.0"}
    assert gfx_targets(several) == ("gfx1030", "gfx1100") and gfx_targets({}) == ()
    assert "should be like 10.3.0, is 'gfx1030'" in refusal(HSA_OVERRIDE_GFX_VERSION="gfx1030")


def test_a_value_is_one_word_of_a_unit():
    assert assignment("A", "b c") == '"A=b c"' and assignment("A", '%h "\\') == '"A=%%h \\"\\\\"'
