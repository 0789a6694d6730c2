"""A tune's record: values or worth nothing, stale by name, and never more than what a tune may choose."""

import json
from dataclasses import replace

import pytest

from llamafleet.settings.speculation import AUTO
from llamafleet.settings.workload import Workload
from llamafleet.tuning.record import Fingerprint, LaterRecordError, Tuned, fitting, record_text, stale
from tests import planning

FILES = {"": [("m.gguf", 5, "a" * 64)]}


def fingerprint(gpus=(24564,), files=FILES, build="b" * 16, text=None, instance=(), settings=(), **machine):
    host = planning.machine(gpus, **machine)
    asked = planning.settings(dict(instance), **dict(settings))
    work = Workload.of(asked.models[0], 8192)
    return Fingerprint.of(host, asked, asked.models[0], build=build, model=files, work=work, text_sha256=text)


def value(settings=(), of=None, ended=1.0):
    """A record as JSON gives it back."""
    text = record_text({
        "schema": 1, "instance": "m0", "settings": dict(settings), "ended": ended, "budget_minutes": 20, "trials": [],
        "fingerprint": vars_of(of or fingerprint()),
        "winner": {"label": "2 threads", "seconds": 2.0, "gain": 1.5, "low": 1.4, "high": 1.6},
    })  # fmt: skip
    return json.loads(text)


def vars_of(of):
    return {**vars(of), "gpus": [vars(gpu) for gpu in of.gpus], "workload": vars(of.workload)}


def test_a_record_is_read_as_it_was_written():
    record = Tuned.of(value({"threads": 2, "kv_types": ["q8_0"]}))
    assert (record.settings, record.winner.gain, record.raw["budget_minutes"]) == (
        {"threads": 2, "kv_types": ("q8_0",)}, 1.5, 20,
    )  # fmt: skip
    assert record.fingerprint == fingerprint() and stale(record, fingerprint()) == ()


@pytest.mark.parametrize(
    "settings",
    [{"extra_flags": ["--x"]}, {"listen": "0.0.0.0"}, {"threads": -1}, {"threads": "2"}, {"cpus": "0; reboot"},
     {"draft": "hf:a/b/c.gguf"}, {"adapters": ["/x"]}],
)  # fmt: skip
def test_a_record_that_chooses_what_no_tune_does_is_worth_nothing(settings):
    assert Tuned.of(value()) is not None and Tuned.of(value(settings)) is None


@pytest.mark.parametrize("broken", [None, [], {}, {"schema": 1}, {"schema": True}, {**value(), "winner": {}}])
def test_a_damaged_record_is_worth_nothing(broken):
    assert Tuned.of(broken) is None


def test_a_later_record_is_refused_by_its_number():
    with pytest.raises(LaterRecordError, match="schema 7"):
        Tuned.of({"schema": 7, "anything": "else"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"build": "c" * 16}, "another build of llama.cpp: bbbbbbbbbbbbbbbb before, cccccccccccccccc now"),
        ({"files": {"": [("m.gguf", 5, "c" * 64)]}}, "other files: model"),
        ({"files": {**FILES, "draft": [("d.gguf", 1, None)]}}, "added or removed: draft"),
        ({"gpus": ()}, "another GPU: NVIDIA GeForce RTX 4090 (24 GiB) before, none now"),
        ({"gpus": ({"name": "RTX 3090"},)}, "another GPU: NVIDIA GeForce RTX 4090 (24 GiB) before, RTX 3090 (24 GiB) now"),
        ({"driver": {"nvidia": "590.1", "cuda": "13.0"}}, "another driver: 580.159.04 before, 590.1 now"),
        ({"ram_gib": 32}, "another amount of RAM: 64.0 GiB before, 32.0 GiB now"),
        ({"cpu": {"model": "EPYC"}}, "another processor: i5-13400F before, EPYC now"),
        ({"cpu": {"physical_cores": 4}},
         "other usable cores: 10 (16 with hyper-threading, 6 of them fast) before, "
         "4 (16 with hyper-threading, 6 of them fast) now"),
        ({"os": {"id": "debian", "version": "13", "arch": "x86_64", "libc": "2.41", "kernel": "6.20"}},
         "another kernel: unknown before, 6.20 now"),
        ({"instance": {"reply_tokens": 9}}, "another workload: reply_tokens"),
        ({"text": "d" * 64}, "another workload: the text of its prompts"),
        ({"instance": {"threads": 3}}, "other settings of the model or the host in the inventory"),
        ({"settings": {"ram_reserve_mib": 4096}}, "other settings of the model or the host in the inventory"),
    ],
)  # fmt: skip
def test_what_makes_a_record_stale_is_named(change, words):
    before, now = fingerprint(), fingerprint(**change)
    said = stale(Tuned.of(value()), now)
    assert len(said) == 1 + ("another workload: live_tokens" in said[-1]) and said[0].startswith(words)
    assert now.key != before.key


@pytest.mark.parametrize(
    "change", [{"gpus": ({"uuid": "GPU-of-another-box"},)}, {"gpus": ({"used_by_others_mib": 900},)}, {"hostname": "x"},
               {"instance": {"port": 9999, "name": "other", "listen": "127.0.0.2"}}],
)  # fmt: skip
def test_what_no_speed_depends_on_leaves_a_record_fresh(change):
    now = fingerprint(**change)
    assert stale(Tuned.of(value()), now) == () and now.key == fingerprint().key


def test_only_what_the_operator_left_open_is_changed():
    record = Tuned.of(value({"threads": 2, "ubatch_tokens": 1024, "kv_types": ["q8_0"], "speculation": "ngram"}))
    [left] = planning.settings({"kv_types": ["f16", "q8_0"]}).models
    [set_by_hand] = planning.settings({"kv_types": ["f16"], "threads": 7}).models
    tuned, kept = record.over(replace(left, speculation=AUTO)), record.over(set_by_hand)
    assert (tuned.threads, tuned.ubatch_tokens, tuned.kv_types, tuned.speculation) == (2, 1024, ("q8_0",), "ngram")
    assert (kept.threads, kept.ubatch_tokens, kept.kv_types, kept.speculation) == (7, 1024, ("f16",), "none")


def test_a_host_takes_its_own_record_or_the_newest_that_holds_of_another():
    own, late = Tuned.of(value(ended=1.0)), Tuned.of(value({"threads": 2}, ended=9.0))
    wrong = Tuned.of(value(of=fingerprint(ram_gib=8), ended=99.0))
    now = fingerprint()
    assert fitting(own, {"b": late}, now) == ("", own)
    assert fitting(wrong, {"a": own, "b": late, "c": wrong}, now) == ("b", late)
    assert fitting(wrong, {"c": wrong}, now) is None and fitting(None, {}, now) is None


def test_the_text_of_a_record_has_an_order_that_stays():
    assert record_text({"b": 1, "a": 2}) == record_text({"a": 2, "b": 1})
