"""A tune on models of a real size with random weights: what it installs is never slower than llama-server as it ships,
and much faster where that does not suit the host."""

import contextlib
import json
from dataclasses import replace
from statistics import median

import pytest

from bench.gpu_proof import shapes
from llamafleet.remote.common import HELPERS, core_of_unit
from llamafleet.service.trial import measured
from llamafleet.tuning.candidates import SHIPPED
from sandbox import oracle_build, quota
from sandbox.layouts import PUBLISHED
from tests.e2e import deploying
from tests.e2e.deploying import on, pyinfra, serves

pytestmark = pytest.mark.long

SIZES = {"vocab": 32768, "quant": "Q4_K_M", "sizes": {}, "tensors": 0}
DENSE = replace(PUBLISHED["Qwen3-8B"], **SIZES, name="dense-1.6B", blocks=32, embd=2048, heads=16, ff=6144)
EXPERTS = replace(PUBLISHED["Qwen3-30B-A3B"], **SIZES, name="experts-2.5B", blocks=4, ff=6144)
OPEN = {"profile": "chat", "context_tokens": 2048, "prompt_tokens": 128, "live_tokens": 256, "reply_tokens": 32,
        "threads": None}  # fmt: skip
PROMPTS = {**OPEN, "prompt_tokens": 768, "live_tokens": 772, "reply_tokens": 4}
REPLIES = {**OPEN, "reply_tokens": 128, "ubatch_tokens": 512, "batch_tokens": 2048, "repack": True}
PAIRS = 9  # a machine drifts by more than a model gains
NEVER_BELOW, WHERE_IT_IS_WRONG = 0.98, 1.3  # times the speed of llama-server as it ships
# What is tuned for how many minutes; the processors whose time the host has, if fewer than it shows; what is asked.
CASES = {
    "dense": (DENSE, OPEN, 5, None, NEVER_BELOW),
    "experts": (EXPERTS, OPEN, 5, None, NEVER_BELOW),
    "one CPU of two": (EXPERTS, {**OPEN, "cpus": "0"}, 5, None, NEVER_BELOW),
    "the time of one CPU": (EXPERTS, REPLIES, 9, 1, WHERE_IT_IS_WRONG),
    "long prompts": (EXPERTS, PROMPTS, 9, None, WHERE_IT_IS_WRONG),
}
KEY = "fedcba9876543210"
SPEC = "var/lib/llamafleet/jobs/tune-model.json"
PROGRAM = ("python3", "-s", "-E", "-B")


@pytest.fixture(scope="module")
def host(boot):
    [host] = boot(1, "measured", 47, packages=oracle_build.COMPILER, optimised=True)
    return host


@pytest.mark.parametrize("case", CASES)
def test_what_is_installed_is_as_fast_as_it_must_be(host, outside, tmp_path, case):
    layout, settings, minutes, processors, least = CASES[case]
    source = outside.publish(f"random/{layout.name}-GGUF", shapes.write(layout, tmp_path))
    base = deploying.settings(outside, host, model={"name": "model", "source": source, **settings})
    inventory = deploying.write_inventory(
        tmp_path / "inventory.py",
        [(host, {**base, "tune": "always", "tune_minutes": minutes, "tune_stops_service": True})],
    )
    with contextlib.ExitStack() as stack:
        if processors:
            stack.enter_context(quota.of_processors(host.cgroup, processors))
        done = pyinfra(inventory, timeout=3600)
        assert done.code == 0, done.text
        record = json.loads(on(host, "cat", "/var/lib/llamafleet/tuned/model.json"))
        ratios = again(host, {one["label"]: one["argv"] for one in record["candidates"]}, record["winner"]["label"])
    spent = sum(trial["took_seconds"] for trial in record["trials"])
    print(f"{case}: {record['settings']}, {len(record['trials'])} trials in {spent:.0f} s; measured again: "
          f"{median(ratios):.3f} times ({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip
    assert spent < minutes * 60
    assert median(ratios) >= least, ratios
    assert serves(host)


def again(host, flags, winner):
    """What is installed and llama-server as it ships, measured in pairs by turns: how many times as fast it is, each."""
    spec = json.loads((host.root / SPEC).read_text())
    installed, baseline = ({**spec["trials"][0], **one} for one in _both(host, flags[SHIPPED], flags[winner]))
    order = [(baseline, installed), (installed, baseline)] * PAIRS
    trials = [{**one, "id": number} for number, one in enumerate(one for pair in order[:PAIRS] for one in pair)]
    asked = {"key": KEY, "trials": trials, "budget_seconds": 3600, "stays_stopped_seconds": 0}
    (host.root / SPEC).write_text(json.dumps({**spec, **asked}))
    job = f"{HELPERS}/current/job.py"
    on(host, *PROGRAM, job, "start", "tune-again", "--", *PROGRAM, f"{HELPERS}/current/tune.py", "run", f"/{SPEC}")
    while json.loads(on(host, *PROGRAM, job, "follow", "tune-again", "--seconds", "30"))["state"] == "running":
        pass
    found = json.loads(on(host, *PROGRAM, f"{HELPERS}/current/tune.py", "read", "model", KEY))
    pairs = [sorted(found[n : n + 2], key=lambda trial: trial["candidate"]) for n in range(0, len(found), 2)]
    return [slow["seconds"] / quick["seconds"] for slow, quick in pairs]


def _both(host, shipped, planned):
    """Command line and directives of the installed service, as a trial has them, and the same with the flags of
    llama-server as it ships and no limit of memory."""
    plan = json.loads(on(host, "cat", "/etc/llamafleet/instances/model/plan.json"))
    unit = core_of_unit(on(host, "cat", "/etc/systemd/system/llama-server-model.service"))
    lines = unit.split("[Service]\n")[1].split("\n[")[0].split("\n")
    argv = measured(plan["gate"]["argv"], has_text=False)["argv"]
    start = argv.index(planned[0])
    assert argv[start : start + len(planned)] == planned
    yield {"candidate": 1, "argv": argv, "directives": lines}
    unlimited = [line for line in lines if not line.startswith("Memory")]
    yield {"candidate": 0, "argv": [*argv[:start], *shipped, *argv[start + len(planned) :]], "directives": unlimited}
