"""What each GPU holds with `--split-mode tensor`: llama-server does not measure it without loading, so it loads."""

import re
import subprocess
import threading
from dataclasses import replace

import pytest

from bench.outline_cases import OUTLINES
from llamafleet.memory.context import Context
from llamafleet.memory.tensor_split import LOADED, UNSUPPORTED, split
from llamafleet.memory.weights import X86_TYPES, Model
from llamafleet.model.gguf import read_path
from sandbox import models, outlines
from sandbox.layouts import PUBLISHED
from sandbox.oracle import build, rpc_server

pytestmark = pytest.mark.oracle
MIB = 2**20
SECONDS = 60
SIZE = re.compile(r"Meta\(\) +(model|KV|RS|DSV4 .* state|compute) buffer size = +([\d.]+) MiB")
NO_BUFFER_MIB = 0.02  # llama-server's two decimals
MOST = 1.5  # of a bound


def loaded(path, context, devices):
    """MiB of weights, context and compute on the GPU that has most, as llama-server logs them; its lines if it fails."""
    flags = ["-c", str(context.tokens * context.slots), "-np", str(context.slots), "-no-kvu", "-fa", "on",
             "-ctk", context.key_type, "-ctv", context.value_type, "-ub", str(context.ubatch_tokens), "-fit", "off",
             "-ngl", "999", "-sm", "tensor", "--no-warmup", "-lv", "4", "--host", "127.0.0.1", "--port", "0"]  # fmt: skip
    with rpc_server(devices) as endpoint:
        command = [str(build().llama_server), "-m", str(path), "--rpc", endpoint, *flags]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as it:
            timer = threading.Timer(SECONDS, it.kill)
            timer.start()
            try:
                return read(raw.decode("utf-8", "replace") for raw in it.stdout)
            finally:
                timer.cancel()
                it.kill()


def read(lines):
    sizes, said = {}, []
    for line in lines:
        said.append(line)
        if match := SIZE.search(line):
            part = {"model": "weights", "compute": "compute"}.get(match[1], "context")
            before = 0.0 if part == "compute" else sizes.get(part, 0.0)
            sizes[part] = before + float(match[2])
        elif "model loaded" in line:
            return sizes
    return "".join(said[-20:])


# Dense, sliding windows, experts, a recurrent state.
OUTLINED = ["gemma2", "qwen2moe", "lfm2"]
# Their heads as published, with fewer and smaller parts of everything else.
PUBLISHED_HEADS = ["Qwen3-0.6B"]
SLOW = ["Qwen2.5-3B", "Qwen3-30B-A3B", "Llama-3.1-8B", "Gemma-3-12B", "gpt-oss-20b", "Qwen3.5-4B", "Qwen3.6-35B-A3B"]
CASES = [
    *(pytest.param(name, marks=() if name in OUTLINED else pytest.mark.long)
      for name in sorted(path.stem for path in OUTLINES.glob("*.yaml"))),
    *PUBLISHED_HEADS, *(pytest.param(name, marks=pytest.mark.long) for name in SLOW),
]  # fmt: skip


def made(name, folder):
    if name not in PUBLISHED:
        return outlines.weightless(OUTLINES / f"{name}.yaml", folder)
    layout = PUBLISHED[name]
    fewer = {"experts": 8, "experts_used": 2} if layout.experts else {}
    small = replace(layout, name="small", blocks=8, vocab=4096, sizes={}, tensors=0, **fewer)
    return models.weightless(folder, small, "Q8_0")


@pytest.mark.parametrize("name", CASES)
def test_no_gpu_holds_more_than_the_bound(name, tmp_path):
    path = made(name, tmp_path)
    model, context = Model.of(read_path(path)), Context(4096, 2, "f16", 512)
    if model.shape.architecture.name in UNSUPPORTED:
        assert "not implemented for architecture" in loaded(path, context, 2)
        return
    for devices in range(2, LOADED.get(model.shape.architecture.name, 0) + 1):
        bound, _ = split(model, context, devices, "cpu", 0, X86_TYPES)
        found = loaded(path, context, devices)
        assert isinstance(found, dict), found
        ours = {"weights": bound.weights_bytes, "context": bound.kv_bytes, "compute": bound.compute_bytes}
        sizes = {part: (round(ours[part] / MIB, 2), size) for part, size in found.items()}
        assert all(size - NO_BUFFER_MIB <= bounded for bounded, size in sizes.values()), sizes
        assert sum(bounded for bounded, _ in sizes.values()) < MOST * sum(size for _, size in sizes.values()), sizes


def test_cuts_between_the_heads_of_two_gpus_are_exact(tmp_path):
    """Where heads and columns divide evenly, which they mostly do for two, the bound of weights and cache is what is."""
    path = made("Qwen3-0.6B", tmp_path)
    model, context = Model.of(read_path(path)), Context(8192, 1, "f16", 512)
    bound, found = split(model, context, 2, "cpu", 0, X86_TYPES)[0], loaded(path, context, 2)
    assert (round(bound.weights_bytes / MIB, 2), round(bound.kv_bytes / MIB, 2)) == (found["weights"], found["context"])
