"""Which record an instance is planned with: the host's own, another that holds, or none, and then why."""

from dataclasses import replace

import pytest

from llamafleet.settings.speculation import AUTO
from llamafleet.tuning.record import Tuned
from llamafleet.tuning.records import Kept, in_words, reason, tuning_of, without
from tests import planning
from tests.tuning.test_record import fingerprint, value

NOW = fingerprint()
OTHER = fingerprint(ram_gib=8)
OWN_PATH = "/var/lib/llamafleet/tuned/m0.json on the host"


def instance(**more):
    [one] = planning.settings({"kv_types": ["f16", "q8_0"]}).models
    return replace(one, **more)


def kept(**files):
    return Kept.of({host: (f"tuned/{host}.json", records) for host, records in files.items()})


def tuned(there=(), known=None, one=None):
    return tuning_of(one or instance(), NOW, dict(there), known or Kept())


def test_without_any_record_the_instance_is_as_the_operator_wrote_it():
    found = tuned()
    assert (found.instance, found.state, list(found.sentences())) == (instance(), "none", [])


def test_the_host_s_own_record_is_used():
    found = tuned({"m0": value({"threads": 2})})
    assert found.instance == instance(threads=2) and (found.state, found.where) == ("used", "")
    assert reason(found) == (
        "measured here: 2 threads: 1.50 times as fast as llama-server as it ships (1.40 to 1.60)"
    )  # fmt: skip


def test_a_host_that_is_alike_has_measured_it():
    files = kept(a={"chat": value({"threads": 3}, ended=1.0)}, b={"m0": value({"threads": 4}, ended=2.0)})
    assert tuned(known=files).where == "on b" and tuned(known=files).instance.threads == 4
    own = tuned({"m0": value({"threads": 2})}, files)
    assert own.where == "" and own.instance.threads == 2
    late = tuned({"m0": value({"threads": 2}, of=OTHER)}, files)  # its own no longer holds
    assert late.where == "on b" and late.stale and list(late.sentences()) == []


def test_another_instance_that_is_alike_has_measured_it():
    found = tuned({"copy": value({"threads": 2}), "else": value({"threads": 9}, of=OTHER)})
    assert found.where == "with copy" and reason(found).startswith("measured with copy: ")


def test_a_copy_of_what_this_host_has_measured_is_not_another_host_s():
    of_copy = value({"threads": 2})
    assert tuned({"copy": of_copy}, kept(box={"copy": of_copy})).where == "with copy"


def test_a_record_that_no_longer_holds_is_named_with_what_differs():
    found = tuned({"m0": value({"threads": 2}, of=OTHER)})
    assert found.instance == instance() and found.state == "stale"
    assert list(found.sentences()) == [
        "what was measured no longer holds: another amount of RAM: 8.0 GiB before, 64.0 GiB now; measure again: "
        "tasks.tune.tune"
    ]


@pytest.mark.parametrize("broken", [{}, {"schema": 1}, {**value(), "settings": {"listen": "0.0.0.0"}}])
def test_a_damaged_record_of_the_host_is_named_by_its_file(broken):
    found = tuned({"m0": broken})
    assert found.state == "unusable" and found.instance == instance()
    assert list(found.sentences()) == [
        f"{OWN_PATH} is damaged; the instance is planned without it: measure again (tasks.tune.tune), or remove it"
    ]


def test_a_record_of_a_later_version_is_named_by_its_number():
    [said] = tuned({"m0": {"schema": 9}}).sentences()
    assert said.startswith(f"{OWN_PATH}: schema 9 is of a later llamafleet, this one knows 1")


def test_the_operator_s_damaged_files_and_records_are_named_and_the_others_used():
    files = kept(a=None, b={"m0": value({"threads": 4}), "chat": {"schema": 1}}, c=[])
    assert files.problems == {
        "a": ("tuned/a.json is damaged: its records are not used; restore or remove it",),
        "b": ("tuned/b.json: chat is damaged; the instance is planned without it: measure again (tasks.tune.tune), or "
              "remove it",),
        "c": ("tuned/c.json is damaged: its records are not used; restore or remove it",),
    }  # fmt: skip
    assert tuned(known=files).where == "on b"


def test_settings_that_do_not_go_together_are_not_used():
    """Somebody edited the record: a draft is guessed with, and none is given."""
    found = tuned({"m0": value({"speculation": "draft"})}, one=instance(speculation=AUTO))
    assert found.state == "unusable" and found.instance.speculation == AUTO
    assert "has settings that do not go together" in next(iter(found.sentences()))


def test_a_record_that_cannot_be_planned_is_left_out_with_the_reason():
    found = without(tuned({"m0": value({"threads": 2})}), "no room")
    assert found.record is None and found.instance == instance() and found.state == "unusable"
    assert list(found.sentences()) == [
        "what was measured here cannot be planned now (no room); the instance is planned without it: measure again "
        "(tasks.tune.tune), or remove it"
    ]


def test_a_record_says_what_won_by_how_much():
    winner = {"label": "2 threads", "seconds": 2.0, "gain": None, "low": None, "high": None}
    assert in_words(Tuned.of({**value(), "winner": winner})) == (
        "2 threads: llama-server as it ships does not run here"
    )  # fmt: skip
    nothing = {**winner, "label": "the plan", "gain": 1.0, "low": 0.97, "high": 1.01}
    assert in_words(Tuned.of({**value(), "winner": nothing})) == (
        "the plan: nothing was proven faster than llama-server as it ships"
    )
