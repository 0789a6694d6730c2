"""What people and programs are shown of a fleet's workload."""

import json
from dataclasses import replace

from llamafleet.cli.workload import HostWorkload, InstanceWorkload, table
from llamafleet.host.answers import Counters
from llamafleet.tuning.observed import fitting
from tests.tuning.test_observed import observed

NOW = {"prompt_tokens": 2048, "live_tokens": None, "reply_tokens": 512, "concurrency": 1}


def one(found, now=NOW, slots=4):
    return InstanceWorkload(found, fitting(found, slots), now)


def test_a_line_for_each_instance_and_the_settings_below():
    text = table({"gpu1": HostWorkload({"code": one(observed())}), "gpu2": HostWorkload(problem="cannot be reached")})
    lines = text.splitlines()
    assert lines[0].split() == ["host", "instance", "requests", "prompt_tokens", "live_tokens", "reply_tokens",
                                "concurrency", "nearest", "profile"]  # fmt: skip
    assert lines[1].split()[:4] == ["gpu1", "code", "500", "800"] and lines[1].endswith("agent (within 1.1x)")
    assert lines[2].split() == ["gpu2", "-"]
    assert lines[3] == "gpu1: code: 500 requests from 1970-01-01 00:00 to 1970-01-01 00:00"
    assert lines[4] == (
        'gpu1: code: fits: "prompt_tokens": 800, "live_tokens": 24000, "reply_tokens": 250, "concurrency": 1; '
        'the inventory has "prompt_tokens": 2048, "live_tokens": None, "reply_tokens": 512, "concurrency": 1'
    )
    assert lines[5:] == ["gpu2: cannot be reached"]


def test_what_fits_can_be_copied_into_an_inventory():
    (line,) = [line for line in table({"a": HostWorkload({"b": one(observed())})}).splitlines() if "fits: " in line]
    entry = json.loads("{" + line.split("fits: ")[1].split("; the inventory")[0] + "}")
    assert entry == fitting(observed(), 4).settings


def test_an_instance_that_nobody_asked_is_said():
    quiet = observed(requests=0).__class__(None, None, 0, 0, 7, None, None, None, None)
    text = table({"gpu1": HostWorkload({"code": one(quiet)})})
    assert text.splitlines()[-1] == "gpu1: code: the journal has no request of a user in this time"


def test_counters_are_of_the_running_server():
    found = replace(observed(), counters=Counters(3751440.0, 89012000.0, 1047820.0))
    assert (
        "gpu1: code: since its start it has read 3,751,440 tokens, taken 89,012,000 from its cache, written 1,047,820"
        in table({"gpu1": HostWorkload({"code": one(found)})}).splitlines()
    )


def test_remarks_and_names_of_a_host_are_one_line_each():
    text = table({"gpu\n1": HostWorkload({"code": one(observed(requests=2, at_once=4), now={})})})
    assert len(text.splitlines()) == 6 and "the inventory has" not in text and "2 requests are too few" in text


def test_a_time_that_no_calendar_has_is_a_number():
    far = observed()
    text = table({"a": HostWorkload({"b": one(far.__class__(**{**far.__dict__, "until": 9e11}))})})
    assert "to 900000000000" in text


def test_the_json_has_everything():
    found = HostWorkload({"code": one(observed())}).to_json()["instances"]["code"]
    assert found["observed"]["prompt_tokens"]["p90"] == 800 and found["now"] == NOW
    assert found["fitting"]["settings"]["concurrency"] == 1 and found["fitting"]["profile"] == "agent"
    json.dumps(found)
