"""llama-server knows every flag that we pass, allow or refuse, under this name and with or without a value."""

import re
import subprocess

import pytest

from llamafleet.planner.plan import plan_host
from llamafleet.remote import inherited
from llamafleet.service.command import argv, credential_flags
from llamafleet.settings import extra_flags as extra
from sandbox import oracle
from tests import planning

pytestmark = pytest.mark.oracle

# A flag's line of --help begins with its names; one blank and a value follow where it takes one, else a gap or nothing.
NAMES = re.compile(r"(?P<names>-[\w-]+(?:,\s+-[\w-]+)*)(?P<value> \S)?")


@pytest.fixture(scope="module")
def takes_value():
    """Every name of a flag in llama-server's own help, and whether a value follows it."""
    command = [oracle.build().llama_server, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    lines = [match for line in text.splitlines() if (match := NAMES.match(line))]
    return {name: bool(line["value"]) for line in lines for name in re.split(r",\s+", line["names"])}


@pytest.mark.parametrize("table", ["SAFE", "DANGEROUS", "OWN_PLACE", "PLANNED", "REFUSED"])
def test_every_flag_that_a_setting_may_name_is_known(table, takes_value):
    assert set(getattr(extra, table)) - set(takes_value) == set()


def test_a_value_follows_where_it_should(takes_value):
    ours = extra.SAFE | {name: has_value for name, (has_value, _) in extra.DANGEROUS.items()}
    assert {name: takes_value[name] for name in ours} == ours


@pytest.mark.parametrize("gpus", [(), (24564,), (24564, 12282)], ids=["no_gpu", "one_gpu", "two_gpus"])
def test_every_flag_that_is_passed_is_known(gpus, takes_value):
    asked = planning.settings({
        "context_tokens": 65536, "slots": 2, "api_key_file": "/keys", "tls_certificate_file": "/c", "tls_key_file": "/k",
        "chat_template_file": "/t", "grammar_file": "/g",
    })  # fmt: skip
    [plan] = planning.plans(planning.machine(gpus, ram_gib=128), [("gpt-oss-120b",)], asked)
    command = [*argv(plan, asked.models[0], "/m.gguf"), *credential_flags(asked.models[0])]
    used = {word for word in command if word.startswith("--")}
    assert used - set(takes_value) == set()
    assert len(used) > 20


@pytest.mark.parametrize(
    ("target", "draft", "kind"),
    [("Llama-3.1-8B", "Llama-3.2-3B", "draft"), ("GLM-4.5-Air", None, "mtp"), ("Llama-3.1-8B", None, "ngram")],
)
@pytest.mark.parametrize("gpus", [(), (98304,)], ids=["no_gpu", "one_gpu"])
def test_every_flag_of_speculation_is_known(target, draft, kind, gpus, takes_value):
    asked = planning.settings({"speculation": kind, **({"draft": "/d.gguf"} if draft else {})})
    headers = {"m0": {"draft": planning.header(draft)}} if draft else {}
    requests = [(asked.models[0], planning.header(target))]
    [plan] = plan_host(planning.machine(gpus, ram_gib=256), requests, asked, companions=headers)
    command = argv(plan, asked.models[0], "/m.gguf", {"draft": "/d.gguf"} if draft else {})
    used = {word for word in command if word.startswith("--spec")}
    assert used - set(takes_value) == set() and len(used) >= 3


def test_every_variable_that_sets_a_flag_is_kept_from_the_servers():
    """--help names the variable of each flag, and the flags that can be negated, whose variable has a second name."""
    text = subprocess.run(
        [oracle.build().llama_server, "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    entries = re.split(r"\n(?=-)", text)
    named = {match[1]: entry for entry in entries if (match := re.search(r"\(env:\s+(\w+)\)", entry))}
    assert len(named) > 130
    negated = {name.replace("LLAMA_ARG_", "LLAMA_ARG_NO_") for name, entry in named.items()
               if "--no-" in entry[:80] and "_NO_" not in name}  # fmt: skip
    assert len(negated) > 15
    assert (set(named) | negated) - set(inherited.VARIABLES) == set()


def test_no_variable_of_the_host_and_no_preset_reaches_a_server(tmp_path):
    """What the units say, without systemd: XDG_CONFIG_HOME is no folder, and the variables are gone."""
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp/config.ini").write_text("no-such-type = 1\nctx-size = nonsense\n")
    command = [oracle.build().llama_server, "--version"]
    for config, code in ((str(tmp_path), 1), (inherited.NO_CONFIG, 0)):
        done = subprocess.run(command, capture_output=True, timeout=60, env={"XDG_CONFIG_HOME": config, "HOME": "/"})
        assert (done.returncode != 0) == bool(code), done.stderr
