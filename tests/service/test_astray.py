"""What lies behind a link is left out, so that the run that removes the link writes what belongs there."""

import dataclasses

import pytest

from llamafleet.host.installed import Place
from llamafleet.service.astray import left_out
from tests.service.test_changes import INSTALLED, SERVICE, changes

LINK = Place("link", 0o777, 0, 0)
UNIT = f"/etc/systemd/system/{SERVICE.unit}"
FOLDER, GOOD = "/etc/llamafleet/instances/demo", "/var/lib/llamafleet/good/demo"


def linked(path):
    return dataclasses.replace(INSTALLED, paths={**INSTALLED.paths, path: LINK})


@pytest.mark.parametrize(
    ("path", "reasons"),
    [
        (f"{FOLDER}/plan.json", ["its plan.json is missing"]),
        (FOLDER, ["its plan.json is missing", "its API keys differ"]),
        ("/etc/llamafleet", ["its plan.json is missing", "its API keys differ"]),
        (f"{GOOD}/api-keys", ["the files to go back to are damaged or missing"]),
        ("/var/lib/llamafleet/good", ["the files to go back to are damaged or missing"]),
        ("/etc/systemd/system/llama-server-demo-liveness.timer", ["its liveness check differs"]),
    ],
)
def test_what_is_behind_a_link_is_to_be_written(path, reasons):
    there = linked(path)
    there = dataclasses.replace(there, instances={
        "demo": dataclasses.replace(there.instances["demo"], loaded=there.instances["demo"].secrets)
    })  # fmt: skip
    needed = changes(there)
    named = needed.of_instance("demo")
    assert all(reason in named for reason in reasons), named
    assert not needed.services


def test_helpers_behind_a_link_are_installed_again():
    assert changes(linked("/opt/llamafleet/helpers")).helpers
    assert not changes(linked("/opt/llamafleet/helpers/current")).helpers


def test_nothing_is_left_out_where_there_is_no_link():
    assert left_out(INSTALLED) == INSTALLED
    assert left_out(linked("/opt/llamafleet/current")).instances == INSTALLED.instances
    assert left_out(linked(UNIT)).instances["demo"].unit_sha256 is None
