"""A projector takes what llama-server says that it takes, by device: weights and compute buffers, to the hundredth MiB.

llama-server reports the sizes of its start, which are of a middling picture; larger and smaller ones are compared with
--image-max-tokens.
"""

import itertools
import re
import subprocess
import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
import yaml

from bench.adopting import source
from llamafleet.memory.projector import projector_bytes
from llamafleet.model.gguf import read_path
from llamafleet.model.projector import read
from llamafleet.model.projector_kinds import KINDS, SPEAKING, SPLIT_KINDS
from llamafleet.planner import reconcile
from llamafleet.planner.plan import plan_host
from llamafleet.remote import verify
from llamafleet.service.command import argv
from sandbox import models, oracle, outlines, projectors, upstream
from tests import planning

pytestmark = pytest.mark.oracle

MIB = 2**20
SECONDS = 60
TOTAL = re.compile(r"\[mtmd\] estimated worst-case memory usage of mmproj is ([\d.]+) MiB")
DEVICE = re.compile(r"\[mtmd\] adding ([\d.]+) MiB to fit_params_target for device (\S+)")
# Pictures of other sizes than those of the start, where a projector has them.
SIZES = [("qwen3-vl-2b", 25), ("qwen3-vl-2b", 900), ("qwen2.5-vl-3b", 100), ("pixtral-12b", 49), ("mistral-small-3.1-24b", 144),
         ("glm-4.1v-9b", 400)]  # fmt: skip


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return models.tiny(tmp_path_factory.mktemp("model"))


def reported(text_model, file, *flags, devices=0):
    """llama-server's MiB by device, "CPU" being the host, and their sum."""
    with ExitStack() as stack:
        rpc = ("--rpc", stack.enter_context(oracle.rpc_server(devices))) if devices else ()
        command = [oracle.build().llama_server, "-m", text_model, *rpc, "--mmproj", file, *flags, "-c", "512",
                   "--host", "127.0.0.1", "--port", "0", "-lv", "5"]  # fmt: skip
        by_device, total, tail = {}, None, []
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            late = threading.Timer(SECONDS, process.kill)
            late.start()
            try:
                for raw in process.stdout:
                    line = raw.decode(errors="replace").rstrip()
                    tail = [*tail, line][-10:]
                    if found := TOTAL.search(line):
                        total = float(found[1])
                    elif found := DEVICE.search(line):
                        by_device[found[2]] = float(found[1])
                    elif "common_memory_breakdown_print" in line:
                        break
            finally:
                late.cancel()
                process.kill()
        assert total is not None, "\n".join(tail)
        return by_device, total


EVERY = {**projectors.PUBLISHED_PROJECTORS, **projectors.OTHER_PROJECTORS}


@pytest.mark.parametrize("name", EVERY)
def test_llama_server_takes_what_is_planned(name, text_model, tmp_path):
    file = projectors.write(EVERY[name], tmp_path)
    projector = read(read_path(file))
    for on_gpu, flash in itertools.product((False, True), repeat=2):
        sizes = projector_bytes(projector, on_gpu=on_gpu, flash_attention=flash)
        place = ("--mmproj-device", "RPC0") if on_gpu else ("--no-mmproj-offload",)
        _, total = reported(text_model, file, *place, "--flash-attn", "on" if flash else "off", devices=int(on_gpu))
        assert sizes.is_exact
        assert sizes.at_start / MIB == pytest.approx(total, abs=0.02), (on_gpu, flash)


@pytest.mark.parametrize(("name", "tokens"), SIZES)
def test_other_sizes_of_pictures_take_what_is_planned(name, tokens, text_model, tmp_path):
    file = projectors.write(projectors.PUBLISHED_PROJECTORS[name], tmp_path)
    projector = read(read_path(file), max_tokens=tokens)
    sizes = projector_bytes(projector, on_gpu=True, flash_attention=True)
    flags = ("--mmproj-device", "RPC0", "--flash-attn", "on", "--image-max-tokens", str(tokens))
    by_device, total = reported(text_model, file, *flags, devices=1)
    assert sizes.at_start / MIB == pytest.approx(total, abs=0.02)
    # The square of this many tokens is the largest picture too; of a film two frames of it are encoded together.
    there, here = (sizes.weights + sizes.compute) / MIB, sizes.host_compute / MIB
    if projector.encoders[0].kind.frames == 1:
        assert (there, here) == (pytest.approx(by_device["RPC0"], abs=0.02), pytest.approx(by_device["CPU"], abs=0.02))
    else:
        assert by_device["RPC0"] <= there + 0.02 and by_device["CPU"] < here


def test_the_question_of_the_verification_is_answered_with_the_projector(text_model, tmp_path):
    file = projectors.tiny(tmp_path, 256)
    sizes = projector_bytes(read(read_path(file)), on_gpu=False, flash_attention=True)
    argv = ("--model", str(text_model), "--ctx-size", "512", "--flash-attn", "on", "--fit", "off",
            "--no-mmproj-offload", "--mmproj", str(file))  # fmt: skip
    command = [oracle.build().llama_server, *reconcile.question(argv)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        try:
            told, tail, _ = verify.read(line.decode(errors="replace").rstrip() for line in process.stdout)
        finally:
            late.cancel()
            process.kill()
    assert "projector" in told, tail
    assert told["projector"] == pytest.approx(sizes.at_start, abs=0.02 * MIB)


def qwen3_vl_8b(folder):
    """The text model of Qwen3-VL-8B (config.json on the Hub), whose first layers take parts of a picture's rows."""
    outline = {
        "architecture": "qwen3vl", "vocabulary": 151936,
        "metadata": {
            "block_count": 36, "context_length": 262144, "embedding_length": 4096, "feed_forward_length": 12288,
            "attention.head_count": 32, "attention.head_count_kv": 8, "attention.key_length": 128,
            "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_sections": [24, 20, 20, 0], "n_deepstack_layers": 3,
        },
        "tensors": {"token_embd.weight": [4096, 151936], "output_norm.weight": [4096], "output.weight": [4096, 151936]},
        "layers": {"all": {
            "attn_norm.weight": [4096], "attn_q.weight": [4096, 4096], "attn_k.weight": [4096, 1024],
            "attn_v.weight": [4096, 1024], "attn_q_norm.weight": [128], "attn_k_norm.weight": [128],
            "attn_output.weight": [4096, 4096], "ffn_norm.weight": [4096], "ffn_gate.weight": [4096, 12288],
            "ffn_up.weight": [4096, 12288], "ffn_down.weight": [12288, 4096],
        }},
    }  # fmt: skip
    path = folder / "qwen3-vl-8b.yaml"
    path.write_text(yaml.safe_dump(outline))
    return outlines.weightless(path, folder)


PAIRS = {
    "gemma-3-12b": lambda folder: models.weightless(folder, "Gemma-3-12B"),
    "gemma-3-27b": lambda folder: models.weightless(folder, "Gemma-3-27B"),
    "mistral-small-3.1-24b": lambda folder: models.weightless(folder, "Mistral-Small-24B"),
    "qwen3-vl-8b": qwen3_vl_8b,
}


@pytest.mark.parametrize("gpus", [(49140,), (16376, 12282), ()], ids=["one_gpu", "two_gpus", "no_gpu"])
@pytest.mark.parametrize("name", PAIRS)
def test_model_and_projector_take_what_the_plan_of_this_very_command_line_says(name, gpus, tmp_path):
    model, projector = PAIRS[name](tmp_path), projectors.write(projectors.PUBLISHED_PROJECTORS[name], tmp_path)
    asked = planning.settings({"projector": str(projector), "context_tokens": 16384, "prompt_cache_mib": 0})
    host = planning.machine(gpus, ram_gib=64)
    [plan] = plan_host(host, [(asked.models[0], read_path(model))], asked,
                       companions={"m0": {"projector": read_path(projector)}})  # fmt: skip
    words = ["llama-server", *argv(plan, asked.models[0], str(model), {"projector": str(projector)})]
    _, *words = (word.replace("CUDA", "RPC") for word in reconcile.question(words))
    with ExitStack() as stack:
        rpc = ("--rpc", stack.enter_context(oracle.rpc_server(len(gpus)))) if gpus else ()
        command = [oracle.build().llama_server, *rpc, *words]
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        try:
            told, tail, _ = verify.read(line.decode(errors="replace").rstrip() for line in process.stdout)
        finally:
            late.cancel()
            process.kill()
    assert "projector" in told, tail
    report = reconcile.MemoryReport({name.replace("RPC", "CUDA"): size for name, size in told.items()})
    verified = reconcile.compare(plan, report)
    # Whole MiB of each row, rounded down, and three rows on the host.
    assert all(abs(size) < 5 * MIB for size in verified.differences.values()), verified


def test_a_type_that_llama_cpp_does_not_know_is_refused_by_both(text_model, tmp_path):
    layout = projectors.PUBLISHED_PROJECTORS["smolvlm2-500m"]
    file = projectors.write(replace(layout, extra={**layout.extra, "clip.projector_type": "idefics9"}), tmp_path)
    with pytest.raises(ValueError, match=r"idefics9.*does not know"):
        read(read_path(file))
    command = [oracle.build().llama_server, "-m", text_model, "--mmproj", file, "--no-mmproj-offload", "-c", "512",
               "--host", "127.0.0.1", "--port", str(oracle.free_port())]  # fmt: skip
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "unknown projector type: idefics9" in ended.stdout + ended.stderr


def test_the_known_types_are_those_of_llama_cpp():
    text = source.read(source.obtain(upstream.TAG), "tools/mtmd/clip-impl.h")
    table = text[text.index("PROJECTOR_TYPE_NAMES = {") :].partition("};")[0]
    assert set(re.findall(r'"([^"]+)"', table)) == {*KINDS, *SPLIT_KINDS, *SPEAKING}
