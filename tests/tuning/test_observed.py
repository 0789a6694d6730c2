"""Which settings fit what a server was asked for."""

from dataclasses import replace

import pytest

from llamafleet.host.answers import Figures, Observed
from llamafleet.settings.profiles import PROFILES
from llamafleet.tuning.observed import fitting, rounded


def same(value, p90=None):
    value = float(value)
    return Figures(value, value, value, float(p90 or value), value, value)


def observed(prompt=800, live=24000, reply=250, at_once=1, requests=500):
    return Observed(1.0, 2.0, requests, 0, 0, same(prompt), same(reply), same(live), same(at_once))


@pytest.mark.parametrize("name", PROFILES)
def test_what_a_profile_describes_is_nearest_to_it(name):
    profile = PROFILES[name]
    found = fitting(
        observed(profile["prompt_tokens"], profile["live_tokens"], profile["reply_tokens"], profile["concurrency"]), 16
    )
    assert found.profile == name and found.factor < 1.05 and found.remarks == ()
    assert set(found.settings) == {"prompt_tokens", "live_tokens", "reply_tokens", "concurrency"}


def test_tokens_are_means_and_concurrency_is_what_is_rarely_exceeded():
    found = fitting(replace(observed(at_once=1), concurrency=same(1.2, p90=3), prompt_tokens=same(873, p90=9000)), 4)
    assert found.settings == {"prompt_tokens": 870, "live_tokens": 24000, "reply_tokens": 250, "concurrency": 3}


def test_the_factor_is_that_of_the_worst_key():
    found = fitting(observed(prompt=896, live=24576 // 2, reply=256), 4)
    assert (found.profile, round(found.factor, 1)) == ("agent", 2.0)


def test_a_server_that_writes_nothing_has_two_settings():
    found = fitting(observed(prompt=300, live=300, reply=0, at_once=4), 8)
    assert found.settings == {"prompt_tokens": 300, "concurrency": 4}


def test_nothing_asked_fits_nothing():
    assert fitting(replace(observed(requests=0), prompt_tokens=None), 4) is None


def test_few_requests_and_busy_slots_are_said():
    assert fitting(observed(requests=3), 4).remarks == ("3 requests are too few to say what is usual",)
    (busy,) = fitting(observed(at_once=4), 4).remarks
    assert busy.startswith("all 4 slots were often busy: more requests may have waited")
    (only,) = fitting(observed(at_once=1), 1).remarks
    assert only.startswith("its only slot was often busy")
    assert fitting(observed(at_once=4), None).remarks == ()


@pytest.mark.parametrize(("tokens", "said"), [(0, 1), (0.4, 1), (7.6, 8), (99.6, 100), (873.2, 870), (24731, 25000)])
def test_two_digits_count(tokens, said):
    assert rounded(tokens) == said
