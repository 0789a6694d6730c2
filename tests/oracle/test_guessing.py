"""Real servers that guess: the gate's comparison passes, and their buffers grow to what the ledger says.

Weights of drafts that read hidden states are zeros: what they guess is always wrong, and the replies stay the same.
"""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import gate_speculation
import pytest
import verify

from llamafleet.memory.context import Context
from llamafleet.memory.ledger import usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.speculation import TYPES, Speculation
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from llamafleet.planner import reconcile
from llamafleet.planner.plan import plan_host
from llamafleet.service.command import argv
from llamafleet.units import MIB
from sandbox import models, oracle, outlines
from sandbox.draft_layouts import DRAFTS, TINY_DRAFTS
from sandbox.layouts import TINY, Layout
from tests import planning

pytestmark = pytest.mark.oracle
# As wide as the outlines' drafts, with the layers that they read.
WIDE = Layout("tiny-wide", "llama", blocks=7, embd=512, heads=8, kv_heads=2, head_dim=64, ff=512, vocab=4096,
              context=8192, rope_base=10000.0, quant="F16")  # fmt: skip
READERS = {
    "eagle3": "eagle3", "eagle3-whole-vocabulary": "eagle3", "dflash": "dflash", "dflash-windows": "dflash",
    "dspark": "dspark", "eagle3 shared": "eagle3", "dflash shared": "dflash",
}  # fmt: skip
OWN = ("  token_embd.", "  output.", "  d2t")
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


def made(folder, name):
    """The draft of an outline; with "shared" behind its name without embedding and output matrix."""
    outline = Path(__file__).parent / "drafts" / f"{name.partition(' ')[0]}.yaml"
    if name.endswith("shared"):
        lines = outline.read_text().splitlines()
        outline = folder / f"shared-{outline.name}"
        outline.write_text("\n".join(line for line in lines if not line.startswith(OWN)))
    return outlines.weightless(outline, folder)


@pytest.mark.parametrize("outline", READERS)
def test_drafts_that_read_hidden_states_take_what_the_ledger_says(outline, folder):
    """The draft's buffers grow when its tokens are sampled, the model's when its hidden states are kept."""
    kind, target = READERS[outline], models.make(WIDE, folder, seed=0)
    draft = made(folder, outline)
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


@pytest.mark.parametrize(
    ("target", "draft", "kind"),
    [("Llama-3.1-8B", "Llama-3.2-1B", "draft"), ("GLM-4.5-Air", None, "mtp"), ("Llama-3.1-8B", None, "ngram"),
     ("Qwen3.5-4B-MTP", None, "mtp")],
)  # fmt: skip
def test_what_the_server_reports_is_what_was_planned(target, draft, kind, folder):
    """The whole way of the stage "verify", but for the host: the plan's own command line is asked and compared."""
    paths = [models.weightless(folder, DRAFTS.get(name, name)) for name in (target, draft) if name]
    asked = planning.settings({"speculation": kind, "context_tokens": 8192, **({"draft": "/d.gguf"} if draft else {})})
    headers = {"m0": {"draft": read_path(paths[1])}} if draft else {}
    machine = planning.machine(ram_gib=256)
    [plan] = plan_host(machine, [(asked.models[0], read_path(paths[0]))], asked, companions=headers)
    command = argv(plan, asked.models[0], str(paths[0]), {"draft": str(paths[1])} if draft else {})
    words = [str(oracle.build().llama_server), *reconcile.question(command)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        told, tail, _ = verify.read(map(str.rstrip, process.stdout), reconcile.beside(command))
        process.kill()
    assert told, tail
    assert any(name.startswith("beside ") for name in told) is (kind != "ngram")
    assert reconcile.compare(plan, reconcile.MemoryReport(told)).beyond(only_more=False) == {}
