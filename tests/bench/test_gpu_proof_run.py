"""The proof from its first line to its plot, with a stand-in for llama-server: which rows it writes, that a cell's
failure and an end in between cost nothing else."""

import stat
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bench.gpu_proof import __main__ as gpu_proof
from bench.gpu_proof import approaches, building, card, cells, rows, serving, shapes
from bench.gpu_proof.cells import CPU_MOE, FIT, N_CPU_MOE, NGL, PLANNED, TUNED
from llamafleet.build import cuda_toolkit
from llamafleet.host import described
from llamafleet.model.gguf import read_path
from tests.bench import fake_cuda

MODEL, LIMIT, CONTEXT = "Qwen3-30B-A3B", 296, 256
# Serves as fast as its flags say: 10 ms a token as planned, less with another ubatch; loads up to 3 layers by -ngl, and
# computes with 2; has all experts in RAM only to answer with an error.
STAND_IN = """#!{python} -IS
import http.server, json, os, pathlib, signal, sys, time
words = sys.argv[1:]
if words == ["--list-devices"]:
    with open(pathlib.Path(__file__).parent / "asked", "a") as file:
        print(file=file)
    asked = (pathlib.Path(__file__).parent / "asked").stat().st_size
    name = "CUDA0" if os.environ.get("CUDA_VISIBLE_DEVICES") == "0" else "Vulkan0"
    print(f"Available devices:\\n  {{name}}: Stand-in (1000 MiB, {{900 + asked}} MiB free)")
    sys.exit()
with open(pathlib.Path(__file__).parent / "starts", "a") as file:
    file.write(" ".join(words) + "\\n")
after = dict(zip(words, words[1:]))
by_hand = after.get("--fit") == "off" and "--device" not in words
layers = int(after["--n-gpu-layers"]) if by_hand else 0
if 3 < layers < 999 or int(after.get("--n-cpu-moe", 4)) < 2:
    print("E ggml_vulkan: Device memory allocation failed: ErrorOutOfDeviceMemory")
    sys.exit(1)

def milliseconds():
    if by_hand:
        return 25 if "--n-cpu-moe" in words else 30
    return 20 if "--fit-target" in words else 10 if after.get("--ubatch-size") != "512" else 5

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass
    def answer(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
    def do_GET(self):
        self.answer(200, {{}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "--cpu-moe" in words or layers == 3:
            return self.answer(500, {{"error": "out of memory"}})
        count, each = asked["n_predict"], milliseconds()
        self.answer(200, {{"tokens": [1] * count, "timings": {{
            "prompt_n": len(asked["prompt"]), "prompt_ms": each * len(asked["prompt"]) / 10,
            "predicted_n": count, "predicted_ms": each * (count - 1)}}}})

def ended(*_):
    print("x: |   - Vulkan0 (Stand-in) | 1000 = 900 + (  30 =  20 +  5 +  5) + 0 |", flush=True)
    sys.exit()

signal.signal(signal.SIGTERM, ended)
http.server.HTTPServer(("127.0.0.1", int(after["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def proof(tmp_path, monkeypatch):
    """Runs it with these options; the machine is one of 16 cores without a GPU of its own."""
    server = tmp_path / "llama-server"
    server.write_text(STAND_IN.format(python=sys.executable))
    server.chmod(server.stat().st_mode | stat.S_IXUSR)
    machine = described.read("cpu,ram=64GB,cores=16").machine
    monkeypatch.setattr(card, "host_machine", lambda: machine)
    work = tmp_path / "work"

    def run(*options):
        words = ["--work", str(work), "--backend", "vulkan", "--scale", "tiny", "--server", str(server), "--models",
                 MODEL, "--limits", str(LIMIT), "--contexts", str(CONTEXT), "--tune-seconds", "0.1"]  # fmt: skip
        return gpu_proof.main([*words, *options])

    run.work, run.starts = work, tmp_path / "starts"
    return run


def read(proof):
    setting = rows.Setting("Stand-in", building.TAG, "tiny")
    return {one.approach: one for one in rows.read(proof.work / "gpu_proof.csv", setting)}


def test_each_approach_has_its_row_and_a_failure_is_one_too(proof, capsys):
    assert proof() == 0
    found = read(proof)
    assert set(found) == set(cells.APPROACHES)
    assert found[PLANNED].decode == 100 and found[PLANNED].prefill == 1000
    assert found[FIT].decode == 50 and "--fit-target 862" in found[FIT].flags, "by what is free then"
    assert found[N_CPU_MOE].chosen == "--n-cpu-moe 2 of 4"
    assert found[NGL].chosen == "-ngl 2 of 5", "3 layers load, and then have no memory to compute"
    assert "out of memory" in found[CPU_MOE].error and found[CPU_MOE].decode == ""
    assert "trials of" in found[TUNED].chosen and found[TUNED].decode >= found[PLANNED].decode
    said = capsys.readouterr().err
    assert "6 cells are missing, 6 of them probably fit" in said and "6 rows in" in said
    assert "</svg>" in (proof.work / "decode.svg").read_text()


def test_it_goes_on_with_what_is_missing(proof, capsys):
    assert proof("--approaches", PLANNED, FIT) == 0
    assert list(read(proof)) == [PLANNED, FIT]
    before = proof.starts.read_text()
    assert proof("--approaches", PLANNED, N_CPU_MOE) == 0
    assert list(read(proof)) == [PLANNED, FIT, N_CPU_MOE]
    assert all("--n-cpu-moe" in line for line in proof.starts.read_text().removeprefix(before).splitlines())
    assert "1 cells are missing" in capsys.readouterr().err


def test_what_has_no_time_is_left_and_said(proof, capsys):
    assert proof("--minutes", "0.2", "--tune-seconds", "300") == 1
    assert "6 cells are missing, 0 of them probably fit" in capsys.readouterr().err
    assert not (proof.work / "gpu_proof.csv").exists() and not proof.starts.exists()


def test_a_limit_that_the_card_cannot_have_costs_no_other_cell(proof, capsys, monkeypatch):
    limited = card.limited

    def refusing(one, limit):
        if limit == LIMIT:
            raise card.CardError("290 MiB are free, 296 are to be left")
        return limited(one, limit)

    monkeypatch.setattr(card, "limited", refusing)
    assert proof("--limits", "296", "400", "--approaches", PLANNED) == 0
    assert [one.limit_mib for one in read(proof).values()] == [400]
    assert "296 MiB: left out: 290 MiB are free" in capsys.readouterr().err


def test_on_cuda_the_rest_of_the_card_is_held_while_servers_run(proof, tmp_path, monkeypatch):
    """One holder for all cells of a limit; llama-server as it ships gets no flag for the limit."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_cuda.build(tmp_path)))
    machine = described.read("rtx4090,ram=64GB,cores=16").machine
    monkeypatch.setattr(card, "host_machine", lambda: machine)
    held = []
    monkeypatch.setattr(card, "limited", lambda *words, limited=card.limited: held.append(words[1]) or limited(*words))
    assert proof("--backend", "cuda", "--limits", "8192", "30000", "--approaches", PLANNED, FIT) == 0
    found = read(proof)
    assert {(one.approach, one.limit_mib, one.error) for one in found.values()} == {
        (PLANNED, 8192, ""),
        (FIT, 8192, ""),
    }
    assert found[FIT].flags == "--ctx-size 256 --parallel 1" and held == [8192, 30000]


def test_more_than_the_limit_is_no_result(proof):
    assert proof("--limits", "280", "--approaches", FIT) == 0  # 24 MiB of buffers, and it takes 30
    assert read(proof)[FIT].error == "more than 280 MiB were allocated on the card"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--server", "/nowhere/llama-server"], "/nowhere/llama-server, which --server names"),
        (["--backend", "cuda"], "an NVIDIA card that its driver lists"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_made(proof, capsys, options, said):
    assert proof(*options) == 1
    assert said in capsys.readouterr().err and list(proof.work.iterdir()) == []


def test_a_compiler_that_is_missing_is_named_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    host = described.read("rtx4090,ram=64GB,cores=10").machine
    tools, cuda, source = building.lacking("cuda", tmp_path / "llama.cpp", host)
    assert tools.startswith("cmake and g++") and cuda.startswith(
        "a CUDA toolkit (nvcc) that fits the driver and the card"
    )
    assert source.startswith(f"{tmp_path}/llama.cpp") and all("give" in one for one in (tools, cuda, source))


CMAKE = """#!/bin/sh
echo "$*" >>{folder}/asked
[ -z "$FAILS" ] || {{ echo "nvcc fatal: no such architecture"; exit 1; }}
[ "$1" != --build ] || {{ mkdir -p "$2/bin" && touch "$2/bin/llama-server"; }}
[ -z "$HANGS" ] || exec sleep 60
"""


@pytest.fixture
def cmake(tmp_path, monkeypatch):
    """A stand-in that notes its arguments; a tree of llama.cpp, and where it is compiled."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "cmake").write_text(CMAKE.format(folder=folder))
    (folder / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/CMakeLists.txt").touch()
    return folder


def compiled(tmp_path, seconds=60.0):
    host = described.read("cpu,ram=64GB,cores=10").machine
    return building.server(tmp_path / "build", tmp_path / "tree", "vulkan", host, time.monotonic() + seconds)


def test_the_server_alone_is_compiled_and_once(cmake, tmp_path):
    assert compiled(tmp_path) == compiled(tmp_path) == tmp_path / "build/bin/llama-server"
    configured, built = (cmake / "asked").read_text().splitlines()
    assert configured.startswith(f"-S {tmp_path}/tree -B {tmp_path}/build") and "-DGGML_VULKAN=ON" in configured
    assert built.startswith(f"--build {tmp_path}/build --target llama-server -j ")


def test_a_compilation_that_fails_or_takes_too_long_says_where_its_log_is(cmake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(building.BuildError, match=r"(?s)build\.log ends:.*no such architecture"):
        compiled(tmp_path)
    monkeypatch.delenv("FAILS")
    monkeypatch.setenv("HANGS", "1")
    with pytest.raises(building.BuildError, match="the time is over while llama-server is compiled: run again"):
        compiled(tmp_path, 0.0)


def test_the_source_of_a_repository_is_that_of_the_release(tmp_path):
    repository = tmp_path / "llama.cpp"
    script = (f"git init -q {repository} && cd {repository} && touch CMakeLists.txt && git add . && git -c user.name=a"
              f" -c user.email=a commit -qm a && git tag {building.TAG} && git mv CMakeLists.txt later && git -c user.name=a"
              " -c user.email=a commit -qm b")  # fmt: skip
    subprocess.run(["sh", "-ec", script], check=True)
    tree = building.checkout(repository, tmp_path / "src")
    assert tree == tmp_path / "src" and [one.name for one in tree.iterdir()] == ["CMakeLists.txt"]
    with pytest.raises(building.BuildError, match=f"no source of {building.TAG}"):
        building.checkout(tmp_path / "build", tmp_path / "other")


def test_an_error_that_nobody_thought_of_ends_its_cell_alone(tmp_path):
    def launch():
        raise RuntimeError("surprise")

    one = cells.Cell(MODEL, LIMIT, CONTEXT, FIT)
    proof = approaches.Proof(
        rows.Setting("a", "b", "tiny"), card.Card("Vulkan0", "a", 1000, 900, "vulkan"), launch, None, None,
        lambda context: cells.workload(context, 128, 8, 2), 4.0,
    )  # fmt: skip
    assert proof.row(one, None).error == "RuntimeError: surprise"


def fast_with(words, unless=()):
    """A proof whose servers need half of the time with these flags, and fail with the others."""

    class Measured(approaches.Proof):
        def measured(self, cell, model, flags, cpus="", runs=None):
            line = " ".join(flags)
            if any(one in line for one in unless):
                raise serving.Failed("out of memory")
            speed = 100.0 if words in line else 50.0
            return serving.Figures((speed,), (speed,), 0.1, "")

    machine = described.read("rtx4090,ram=128GB,cores=16").machine
    return Measured(
        rows.Setting("a", "b", "tiny"), card.Card("CUDA0", "a", 24576, 24000, "cuda"), None, machine, None,
        lambda context: cells.workload(context, 128, 8, 2), 10.0, say=lambda text: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = shapes.write(shapes.layouts("tiny")[MODEL], tmp_path_factory.mktemp("model"))
    return approaches.Model(MODEL, path, read_path(path), True)


def test_a_tune_installs_what_its_course_proves_and_measures_it_anew(model):
    row = fast_with("--threads 8 ").row(cells.Cell(MODEL, 560, CONTEXT, TUNED), model)
    assert row.error == "" and "8 threads" in row.chosen and "faster in 6 pairs" in row.chosen
    assert row.decode == 100 and "--threads 8 " in row.flags


def test_without_anything_faster_a_tune_installs_the_plan(model):
    row = fast_with("nothing").row(cells.Cell(MODEL, 560, CONTEXT, TUNED), model)
    assert row.chosen.startswith("the plan: ") and row.decode == 50


def test_the_time_of_a_tune_is_a_bound(model):
    """A trial that takes too long is the last one."""
    proof = replace(fast_with("--threads 8 "), tune_seconds=0.0)
    row = proof.row(cells.Cell(MODEL, 560, CONTEXT, TUNED), model)
    assert row.chosen.startswith("the plan: ") and "1 trials of 3 candidates" in row.chosen


def test_the_build_is_the_deploys_for_this_card_alone(monkeypatch):
    found = cuda_toolkit.Toolkit("/opt/cuda", "/opt/cuda/bin/nvcc", "12.8", "cuda-12.8", "/usr/bin/g++-13")
    monkeypatch.setattr(building, "toolkit", lambda host: found)
    flags = building.flags("cuda", described.read("rtx4090,ram=64GB,cores=10").machine)
    assert {"-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=89", building.ONLY_F16} <= set(flags)
    assert {"-DCMAKE_CUDA_COMPILER=/opt/cuda/bin/nvcc", "-DCMAKE_CUDA_HOST_COMPILER=/usr/bin/g++-13"} <= set(flags)
    assert building.libraries("cuda", None)["LD_LIBRARY_PATH"].split(":")[0] == "/opt/cuda/lib64"
    assert building.libraries("vulkan", None) == {}
    assert not [
        flag for flag in building.flags("vulkan", described.read("cpu,ram=64GB,cores=10").machine) if "CUDA" in flag
    ]


def test_a_context_that_is_filled_grows_and_is_never_read_again(monkeypatch):
    """Else a model with windows would read all of it once more."""
    asked = []

    def post(self, url, prompt, reply):
        asked.append((list(prompt), reply))
        return {
            "tokens": [7] * reply,
            "timings": {"prompt_n": 4, "prompt_ms": 8.0, "predicted_n": reply, "predicted_ms": 90.0},
        }

    monkeypatch.setattr(serving.Launch, "_post", post)
    launch = serving.Launch(Path("s"), Path("m"), 1000, {}, Path("."), time.monotonic() + 60)
    work = cells.Workload(prompt=4, reply=10, depth=20, runs=2)
    assert list(launch._requests("", work)) == [(500.0, 100.0)] * 2
    assert [len(prompt) for prompt, _ in asked] == [20, 20 + serving.WARMING_TOKENS + 4, 24 + 4 + 10 + 4]
    for (before, reply), (after, _) in pairwise(asked):
        assert after[: len(before) + reply] == [*before, *[7] * reply]
    asked.clear()
    list(launch._requests("", replace(work, depth=0)))
    assert [len(prompt) for prompt, _ in asked] == [4, 4, 4] and len({tuple(prompt) for prompt, _ in asked}) == 3
