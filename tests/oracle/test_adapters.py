"""LoRA adapters: what llama-server allocates for them and for its graph with them, against the ledger.

It loads adapters only with a model, so that a model of a few layers with a published model's dimensions is loaded:
its weights are a hole.
"""

import os
import re
import subprocess
import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest

from llamafleet.memory.adapters import merged, unfit
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from sandbox import adapters, models, oracle
from sandbox.layouts import PUBLISHED, Layout

pytestmark = pytest.mark.oracle

MIB = 2**20
BUFFER = re.compile(r"(\S+) +(LoRA|compute) buffer size = +([\d.]+) MiB")
# The numbers of config.json of Qwen/Qwen2.5-7B-Instruct and mistralai/Mistral-7B-v0.3.
QWEN = Layout("Qwen2.5-7B", "qwen2", blocks=28, embd=3584, heads=28, kv_heads=4, head_dim=128, ff=18944, vocab=152064,
              rope_base=1e6, qkv_biases=True)  # fmt: skip
MISTRAL = Layout("Mistral-7B", "llama", blocks=32, embd=4096, heads=32, kv_heads=8, head_dim=128, ff=14336, vocab=32768,
                 rope_base=1e6)  # fmt: skip
LLAMA, OLMOE = PUBLISHED["Llama-3.1-8B"], PUBLISHED["OLMoE-1B-7B"]
LAYERS = 3
QV, OUTSIDE = r"blk\.\d+\.attn_(q|v)\.weight", r"token_embd\.weight|output\.weight|blk\.0\.ffn_down\.weight"
ALL = adapters.ALL_LINEAR


@pytest.mark.parametrize(
    ("layout", "ranks", "on_gpu"),  # ranks: (rank, matrices) of each adapter; on_gpu: layers with the output
    [
        pytest.param(LLAMA, ((16, ALL),), 4, id="Llama-3.1-8B-r16", marks=pytest.mark.long),
        pytest.param(
            LLAMA, ((8, ALL), (64, QV)), 2, id="Llama-3.1-8B-r8-and-r64-in-part-on-the-host", marks=pytest.mark.long
        ),
        pytest.param(QWEN, ((64, ALL),), 4, id="Qwen2.5-7B-r64", marks=pytest.mark.long),
        pytest.param(MISTRAL, ((64, ALL),), 0, id="Mistral-7B-r64-on-the-host"),
        pytest.param(MISTRAL, ((16, OUTSIDE),), 2, id="Mistral-7B-r16-of-input-and-output"),
        pytest.param(OLMOE, ((8, ALL),), 2, id="OLMoE-r8-experts-in-part-on-the-host", marks=pytest.mark.long),
    ],
)
def test_adapters_take_what_is_planned(layout, ranks, on_gpu, tmp_path):
    layout = replace(layout, blocks=LAYERS)
    model = models.weightless(tmp_path, layout)
    files = [adapters.lora(tmp_path, layout, rank=rank, matrices=which, name=f"lora-{number}")
             for number, (rank, which) in enumerate(ranks, 1)]  # fmt: skip
    base, added = read_path(model), {number: read_path(file) for number, file in enumerate(files, 1)}
    assert [unfit(base, one) for one in added.values()] == [""] * len(added)
    told = loaded(model, files, on_gpu)
    placement = Placement.of((None,) * (LAYERS + 1 - on_gpu) + (0,) * on_gpu)
    context = Context(4096, 1, "f16", 512)
    bare, with_them = (usage(Model.of(header), context, placement, "cpu") for header in (base, merged(base, added)))
    for device in [*with_them[0], None]:
        row, alone = (found[1] if device is None else found[0][device] for found in (with_them, bare))
        sizes = {kind: sum(size for (name, what), size in told.items()
                           if what == kind and name.startswith("CPU") == (device is None)) for kind in ("LoRA", "compute")}  # fmt: skip
        assert sizes["LoRA"] == pytest.approx((row.weights_bytes - alone.weights_bytes) / MIB, abs=0.02)
        assert sizes["compute"] == pytest.approx(row.compute_bytes / MIB, abs=0.02)
    assert any(kind == "LoRA" for _, kind in told)


def loaded(model, files, on_gpu):
    """MiB of each device's adapters, and of its compute buffer once they are applied, by device and kind."""
    flags = f"-c 4096 -np 1 -ub 512 -fa on --fit off --cache-ram 0 -ngl {on_gpu} -t 1 -lv 4 --no-ui".split()
    with ExitStack() as stack:
        rpc = ["--rpc", stack.enter_context(oracle.rpc_server(1))] if on_gpu else []
        command = [oracle.build().llama_server, "-m", model, *rpc, *flags, "--port", oracle.free_port(),
                   "--lora-scaled", ",".join(f"{file}:1.0" for file in files)]  # fmt: skip
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env={**os.environ, "GGML_NO_BACKTRACE": "1"})  # fmt: skip
        late = threading.Timer(60, process.kill)
        late.start()
        sizes, lines = {}, []
        try:
            for raw in process.stdout:
                lines.append(raw.decode(errors="replace"))
                for name, kind, size in BUFFER.findall(lines[-1]):
                    key = (name, kind)
                    sizes[key] = float(size) + (sizes.get(key, 0.0) if kind == "LoRA" else 0.0)  # compute: the last
                if "model loaded" in lines[-1]:
                    return sizes
        finally:
            late.cancel()
            process.kill()
            process.stdout.close()
            process.wait()
    raise AssertionError("".join(lines[-10:]))


def test_an_embedding_that_is_the_output_too_ends_the_server_and_is_refused(tmp_path):
    layout = replace(MISTRAL, blocks=1, tied=True)
    model = models.weightless(tmp_path, layout)
    file = adapters.lora(tmp_path, layout, matrices=r"token_embd\.weight")
    assert "llama.cpp cannot compute that" in unfit(read_path(model), read_path(file))
    with pytest.raises(AssertionError, match=r"GGML_ASSERT.*can_mul_mat"):
        loaded(model, [file], 0)
