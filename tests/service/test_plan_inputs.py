"""Measured rates: a new plan is chosen with them, an installed one stays, and its predicted speed follows them."""

import dataclasses

import pytest

from llamafleet.host.learned import Bandwidth, Expected, MeasuredSpeeds
from llamafleet.host.recorded import PlanRecord
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.service.changes import changes_needed
from llamafleet.service.instance_changes import sha256
from tests import planning
from tests.service.test_changes import INSTANCE
from tests.service.test_desired import decide, survey
from tests.tuning.test_record import fingerprint, value

GPUS = [{"total_mib": 24564}]
HARDWARE = "a box"
SLOW = MeasuredSpeeds("old", 1.0, 10.0, Expected(10.0, 100.0, "host", 20e9, 1e12))


def decided(bandwidth=None, gates=(), record=None, layout="gpt-oss-120b", tuned=None):
    """What is decided for a host with these measurements, on which `record` is installed. `tuned`: speeds of a tune of
    another instance."""
    there = {"m0": dataclasses.replace(INSTANCE, record=PlanRecord.of(record))} if record else {}
    probe = Bandwidth(bandwidth, HARDWARE) if bandwidth else None
    records = {"old": tune_record(tuned)} if tuned else {}
    read = survey(GPUS, instances=there, bandwidth=probe, gate_speeds=gates, tuned=records)
    settings = planning.settings({"source": "https://x/m.gguf", "context_tokens": 32768})
    file = RemoteFile("m.gguf", "https://x/m.gguf", 5, "a" * 64)
    return decide(settings, read, {"m0": ModelFiles((file,), planning.header(layout))})


def tune_record(speeds):
    """A record of the same hardware, of another model and workload."""
    trial = {"candidate": 1, "decode_tokens_per_s": speeds.decode_tokens_per_s, "drafted": 0,
             "prompt_tokens_per_s": speeds.prompt_tokens_per_s}  # fmt: skip
    of = fingerprint(gpus=GPUS, files={"": [("old.gguf", 5, "f" * 64)]})
    return {**value(of=of), "trials": [trial], "expected": speeds.expected.to_json()}


def only(desired):
    [serving] = desired.servings
    return serving


def test_a_new_plan_is_chosen_with_what_was_measured_and_says_so():
    estimated, probed = only(decided()), only(decided(bandwidth=10e9))
    rates = probed.record["inputs"]["rates"]
    assert rates["probe"] == {"bytes_per_s": 10e9, "hardware": HARDWARE, "why": ""}
    assert rates["chosen"]["probe_bytes_per_s"] == 10e9 and rates["chosen"]["host_bytes_per_s"] is None
    assert probed.plan.predicted.decode_source == "probe"
    assert probed.plan.predicted.decode_tokens_per_s < estimated.plan.predicted.decode_tokens_per_s


@pytest.mark.parametrize("now", [{"bandwidth": 10e9}, {"gates": (SLOW,)}, {"bandwidth": 10e9, "gates": (SLOW,) * 3},
                                 {"tuned": SLOW}])  # fmt: skip
def test_an_installed_plan_stays_whatever_is_measured_later(now):
    first = only(decided())
    later = only(decided(**now, record=dict(first.record)))
    assert later.plan.argv == first.plan.argv and later.record["plan"] == first.record["plan"]
    assert later.record["identity"] == first.record["identity"]
    assert later.plan.predicted.decode_tokens_per_s < first.plan.predicted.decode_tokens_per_s
    assert later.plan.predicted.decode_source == (
        "probe" if "bandwidth" in now and "gates" not in now else "measured on this host"
    )


def test_a_second_run_with_the_same_measurements_writes_nothing():
    first = decided(bandwidth=10e9, gates=(SLOW,))
    again = decided(bandwidth=10e9, gates=(SLOW, SLOW), record=dict(only(first).record))
    assert only(again).record["inputs"] == only(first).record["inputs"]
    assert noted(first, again) == ()


def test_a_record_without_rates_is_written_once_and_for_a_probe_that_came_later_not():
    """A host that was busy at the first run and is not at the second changes nothing in it."""
    first = decided()
    earlier = {**only(first).record, "inputs": {key: value for key, value in only(first).record["inputs"].items()
                                                if key != "rates"}}  # fmt: skip
    assert noted(first, decided(record=earlier), earlier) == ("m0",)
    probed = decided(bandwidth=10e9, record=dict(only(first).record))
    assert noted(first, probed) == ()
    assert noted(probed, decided(bandwidth=10e9, record=dict(only(probed).record))) == ()
    assert noted(probed, decided(bandwidth=20e9, record=dict(only(probed).record))) == ("m0",)  # of other memory
    chosen = only(probed).record["inputs"]["rates"]["chosen"]
    assert chosen["probe_bytes_per_s"] is None  # the plan was chosen without


def noted(installed, desired, record=None):
    """Whether plan.json is written again, where everything else is as wanted."""
    serving, was = only(desired), only(installed)
    instance = dataclasses.replace(
        INSTANCE, record=PlanRecord.of(record or dict(was.record)), argv=serving.service.argv,
        exe=serving.service.argv[0], secrets={}, unit_sha256=sha256(serving.service.unit_text), good_sha256=sha256(serving.service.unit_text),
        liveness_sha256={name: sha256(text) for name, text in serving.service.liveness.items()}, liveness="active",
        good_liveness_sha256={name: sha256(text) for name, text in serving.service.liveness.items()},
    )  # fmt: skip
    there = dataclasses.replace(desired.installed, instances={"m0": instance}, releases={desired.build.key: {}})
    found = changes_needed(desired, there)
    assert not found.services and not found.refreshed, found
    return found.note
