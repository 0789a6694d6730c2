"""Real models: how close predicted speeds come to measured ones, after the survey's probe and after a gate of another."""

import itertools
import json
import subprocess
import sys
from statistics import median

import pytest

from sandbox import oracle_build, real_models
from tests.e2e import deploying
from tests.e2e.deploying import ROOT, ask, environment, pyinfra

pytestmark = pytest.mark.long

MODELS = {"1.5B": real_models.QWEN_1_5B, "0.5B": real_models.QWEN_0_5B, "270M": real_models.GEMMA_270M}
WORK = {"context_tokens": 2048, "prompt_tokens": 512, "live_tokens": 544, "reply_tokens": 64, "concurrency": 1,
        "threads": None}  # fmt: skip
REQUESTS = 5
AFTER_PROBE, AFTER_GATE = 0.25, 0.15  # most that the median of the errors may be


@pytest.fixture(scope="module")
def host(boot):
    [host] = boot(1, "measured", 47, packages=oracle_build.COMPILER, optimised=True)
    return host


@pytest.fixture(scope="module")
def inventories(outside, host, tmp_path_factory):
    """By model, the inventory of a host that serves it alone."""
    folder = tmp_path_factory.mktemp("predictions")

    def inventory(name):
        [file] = real_models.fetch(MODELS[name]).values()
        source = outside.publish(f"real/{name}-GGUF", file)
        model = {"name": f"m-{name.lower().replace('.', '-')}", "source": source, **WORK}
        settings = deploying.settings(outside, host, model=model)
        return deploying.write_inventory(folder / f"{name.replace('.', '-')}.py", [(host, settings)])

    return {name: inventory(name) for name in MODELS}


def predicted(inventory):
    """What `llamafleet plan` says now, tokens/s written and read, and where that comes from."""
    words = [sys.executable, "-m", "llamafleet.cli", "plan", "--inventory", str(inventory), "--json"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [[plan]] = [one["models"].values() for one in json.loads(done.stdout).values()]
    told = plan["predicted"]
    return (told["decode_tokens_per_s"], told["prefill_tokens_per_s"]), (told["decode_source"], told["prefill_source"])


def measured(host):
    """Of requests with a prompt as long as the workload's, as the server says: the medians, tokens/s written and read."""
    text = (ROOT / "README.md").read_text()
    tokens = ask(host, "/tokenize", {"content": text})[1]["tokens"][: WORK["prompt_tokens"]]
    assert len(tokens) == WORK["prompt_tokens"]
    body = {"prompt": tokens, "n_predict": WORK["reply_tokens"], "ignore_eos": True, "cache_prompt": False}
    timings = [ask(host, "/completion", body)[1]["timings"] for _ in range(REQUESTS + 1)][1:]  # the first one warms up
    assert {(one["prompt_n"], one["predicted_n"]) for one in timings} == {(len(tokens), WORK["reply_tokens"])}
    return tuple(median(one[f"{kind}_per_second"] for one in timings) for kind in ("predicted", "prompt"))


def test_predicted_speeds_are_met(host, inventories):
    before = {name: predicted(inventory) for name, inventory in inventories.items()}
    after, found = {}, {}
    for name, inventory in inventories.items():
        done = pyinfra(inventory, timeout=3600)
        assert done.code == 0, done.text
        found[name] = measured(host)
        for other in set(MODELS) - {name}:
            after[name, other] = predicted(inventories[other])
    assert {sources for _, sources in before.values()} == {("probe", "probe")}
    assert {sources for _, sources in after.values()} == {("measured on this host",) * 2}
    by_probe = errors((name, told, found[name]) for name, (told, _) in before.items())
    by_gate = errors((f"{other} after {name}", told, found[other]) for (name, other), (told, _) in after.items())
    for kind in (0, 1):
        assert median(one[kind] for one in by_probe) <= AFTER_PROBE, by_probe
        assert median(one[kind] for one in by_gate) <= AFTER_GATE, by_gate


def errors(rows):
    """Relative errors of each prediction, written and read."""
    found = []
    for label, told, real in rows:
        found.append([abs(one / other - 1) for one, other in zip(told, real, strict=True)])
        shown = itertools.chain.from_iterable(zip(told, real, found[-1], strict=True))
        print("{}: written {:.1f} for {:.1f} ({:.0%}), read {:.0f} for {:.0f} ({:.0%})".format(label, *shown))
    return found
