"""A chat template, a grammar, a JSON schema of the operator's: with the unit, in the identity, its drift seen."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llamafleet.host.installed import Installed
from llamafleet.service.instance_changes import differences, quiet_differences, sha256
from llamafleet.service.record import credentials
from tasks.lib import text_diffs
from tests.planning import settings
from tests.service.test_changes import GROUND, INSTANCE, SERVICE
from tests.service.test_desired import RUN, decided

TEMPLATE = "{{ messages[0].content }}\r\n"
FILES = {"chat-template": TEMPLATE, "json-schema": '{"type": "object"}'}
ASKED = {"chat_template_file": "/t", "json_schema_file": "/s"}


def with_files(files=FILES, **asked):
    run = dataclasses.replace(RUN, secrets={"m0": files})
    return decided(run=run, models=({**ASKED, **asked},)).servings[0]


def test_the_service_loads_them_from_its_credentials():
    service = with_files().service
    folder = "/run/credentials/llama-server-m0.service"
    assert service.argv[-4:] == (
        "--chat-template-file", f"{folder}/chat-template", "--json-schema-file", f"{folder}/json-schema",
    )  # fmt: skip
    instance = settings({"name": "m0", **ASKED}).models[0]
    assert credentials(instance) == {name: f"/etc/llamafleet/instances/m0/{name}" for name in FILES}
    assert not any(text in service.plan_json for text in FILES.values())


def test_they_are_in_the_identity_by_their_sums_and_nothing_is_without_them():
    one, other = with_files(), with_files({**FILES, "chat-template": "other"})
    told = json.loads(one.service.plan_json)["gate"]["prompt_files"]
    assert told["json-schema"] == dict.fromkeys(("sha256", "served_sha256"), sha256(FILES["json-schema"]))
    assert told["chat-template"] == {
        "sha256": sha256(TEMPLATE),
        "served_sha256": sha256("{{ messages[0].content }}"),  # as llama-server's lexer holds it
    }
    assert one.service.identity != other.service.identity
    assert "prompt_files" not in decided().servings[0].record["gate"]


@pytest.mark.parametrize(
    ("there", "loaded", "restart", "quiet"),
    [
        (TEMPLATE, TEMPLATE, (), ()),
        ("edited", TEMPLATE, (), ("its chat template differs",)),  # on the disk alone
        (None, TEMPLATE, (), ("its chat template differs",)),
        ("old", "old", ("its chat template differs",), ()),
        (TEMPLATE, "old", ("its chat template differs from what it runs with",), ()),
    ],
)
def test_drift_is_seen_and_what_the_server_runs_with_decides_whether_it_starts_again(there, loaded, restart, quiet):
    texts = {"api-keys": "secret\n", "chat-template": TEMPLATE}
    service = dataclasses.replace(SERVICE, secrets=texts)
    found = {**INSTANCE.secrets, **({"chat-template": sha256(there)} if there else {})}
    installed = dataclasses.replace(
        INSTANCE, secrets=found, loaded={**INSTANCE.secrets, "chat-template": sha256(loaded)}
    )
    assert differences(service, installed, GROUND) == restart
    assert quiet_differences(service, installed) == quiet


def test_a_change_of_the_text_is_shown_and_that_of_a_secret_is_not():
    desired = decided(run=dataclasses.replace(RUN, secrets={"m0": {"chat-template": "a\nnew\n", "api-keys": "k\n"}}),
                      models=({"chat_template_file": "/t", "api_key_file": "/k"},))  # fmt: skip
    there = dataclasses.replace(INSTANCE, secrets={"chat-template": sha256("a\nold\n"), "api-keys": sha256("old\n")})
    installed = dataclasses.replace(desired.installed, instances={"m0": there})
    assert isinstance(installed, Installed)
    now = dataclasses.replace(
        desired,
        inputs=dataclasses.replace(
            desired.inputs, survey=dataclasses.replace(desired.inputs.survey, installed=installed)
        ),
    )
    read = []
    [told] = text_diffs.differences(now, lambda path: read.append(path) or ["a", "old"])
    assert read == ["/etc/llamafleet/instances/m0/chat-template"]
    assert told.splitlines()[0] == "m0: chat template, /etc/llamafleet/instances/m0/chat-template:"
    assert {"-old", "+new", " a"} <= set(told.splitlines()) and "k" not in told.splitlines()
    same = dataclasses.replace(there, secrets={"chat-template": sha256("a\nnew\n")})
    installed = dataclasses.replace(desired.installed, instances={"m0": same})
    survey = dataclasses.replace(desired.inputs.survey, installed=installed)
    now = dataclasses.replace(desired, inputs=dataclasses.replace(desired.inputs, survey=survey))
    assert list(text_diffs.differences(now, pytest.fail)) == []
