"""Real servers that guess: the gate's comparison passes, and their buffers grow to what the ledger says.

Weights of drafts that read hidden states are zeros: what they guess is always wrong, and the replies stay the same.
"""

import re
from dataclasses import replace
from pathlib import Path

import gate_speculation
import pytest

from llamafleet.memory.context import Context
from llamafleet.memory.ledger import usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.speculation import TYPES, Speculation
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from llamafleet.units import MIB
from sandbox import models, oracle, outlines
from sandbox.draft_layouts import TINY_DRAFTS
from sandbox.layouts import TINY, Layout

pytestmark = pytest.mark.oracle
# As wide as the outlines' drafts, with the layers that they read.
WIDE = Layout("tiny-wide", "llama", blocks=7, embd=512, heads=8, kv_heads=2, head_dim=64, ff=512, vocab=4096,
              context=8192, rope_base=10000.0, quant="F16")  # fmt: skip
READERS = {
    "eagle3": "eagle3", "eagle3-whole-vocabulary": "eagle3", "dflash": "dflash", "dflash-windows": "dflash",
    "dspark": "dspark",
}  # fmt: skip
BUFFER = re.compile(r"sched_reserve: +CPU compute buffer size = +([\d.]+) MiB")
CONTEXT = Context(2048, 1, "f16", 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def served(folder, kind, target, draft=None):
    """What the gate finds of a server with these files, what was guessed, and the buffers that the server logs, in order,
    in MiB."""
    port, log = oracle.free_port(), folder / "log"
    command = [oracle.build().llama_server, "-m", target, "--port", str(port), "-c", "2048", "-np", "1", "-t", "1"]
    command += ["-fit", "off", "--no-ui", "-lv", "4", "-fa", "on", "--cache-ram", "0", "--spec-type", TYPES[kind]]
    command += ["-md", draft] if draft else []
    with oracle.serving(command, port, log) as url:
        spec = {"url": url, "api_keys": None, "measured": {}, "speculation": {"kind": kind, "least": 0}}
        found = gate_speculation.check_speculation(spec)
    sizes = [float(size) for size in BUFFER.findall(log.read_text())]
    return found, spec["measured"].get("speculation"), sizes


def on_host(path, context, *, head=False):
    model = Model.of(read_path(path), head=head)
    return usage(model, context, Placement.of((None,) * (model.layers + 1)), "cpu")[1]


@pytest.mark.parametrize("outline", READERS)
def test_drafts_that_read_hidden_states_take_what_the_ledger_says(outline, folder):
    """The draft's buffers grow when its tokens are sampled, the model's when its hidden states are kept."""
    kind, target = READERS[outline], models.make(WIDE, folder, seed=0)
    draft = outlines.weightless(Path(__file__).parent / "drafts" / f"{outline}.yaml", folder)
    found, guesses, buffers = served(folder, kind, target, draft)
    assert found["ok"] and guesses["drafted"] > 0, found
    speculation = Speculation(kind, 3, 0)
    own = speculation.served(Model.of(read_path(target)).shape, CONTEXT, read_path(draft))
    alone = on_host(target, own).compute_bytes
    drafts = [
        on_host(draft, replace(speculation.of_draft(own, "f16"), sampled=sampled)).compute_bytes
        for sampled in (False, True)
    ]
    kept = own.kept * WIDE.embd * 512 * 4
    assert buffers == pytest.approx([size / MIB for size in (alone, *drafts, alone + kept)], abs=0.02)


def test_a_head_takes_what_the_ledger_says(folder):
    target = models.make(TINY_DRAFTS["head"], folder, seed=0)
    found, guesses, buffers = served(folder, "mtp", target)
    assert found["ok"] and guesses["drafted"] > 0, found
    own = Speculation("mtp", 3, 0).served(Model.of(read_path(target)).shape, CONTEXT, None)
    alone = on_host(target, replace(own, head=False), head=True).compute_bytes
    both = on_host(target, own, head=True).compute_bytes
    assert buffers == pytest.approx([size / MIB for size in (alone, both - alone, both - alone)], abs=0.02)


@pytest.mark.parametrize("target", ["dense", "hybrid"])
def test_a_small_model_of_the_same_vocabulary_guesses(target, folder):
    draft = models.make(TINY_DRAFTS["draft"], folder, seed=1)
    found, guesses, _ = served(folder, "draft", models.tiny(folder, target), draft)
    assert found["ok"] and guesses["drafted"] > 0, found


def test_a_model_that_guesses_for_itself_is_always_right(folder):
    target = models.make(TINY["dense"], folder, seed=0)
    found, guesses, _ = served(folder, "draft", target, target)
    assert found["ok"] and guesses["accepted"] == guesses["drafted"] > 0, found


def test_a_draft_of_another_vocabulary_is_not_used_and_the_gate_says_so(folder):
    other = models.make(TINY_DRAFTS["other"], folder, seed=1)
    found, guesses, _ = served(folder, "draft", models.tiny(folder, "dense"), other)
    assert not found["ok"] and guesses is None and "could not use the draft" in found["hint"]
