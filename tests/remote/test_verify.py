"""The question on the host: a stand-in for systemd-run starts a stand-in for llama-server, or the real one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types

import pytest
import switch

from llamafleet.planner.reconcile import question
from llamafleet.remote import verify

MIB = 2**20
HEAD = "0.00.010.260 I common_memory_breakdown_print: | memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |"
TWO_DEVICES = [
    "0.00.006.229 I cmn  common_init_: fitting params to device memory ...",
    HEAD,
    "0.00.1 I common_memory_breakdown_print: |   - CUDA0 (RTX 4090 (24 GB)) | 24105 = 24105 + (19413 = 14550 +    4644 +     219) +      -19413 |",
    "0.00.1 I common_memory_breakdown_print: |   - CUDA1 (RTX 3060)         | 12288 =   100 + ( 1413 =   550 +     644 +     219) +       10775 |",
    "0.00.1 I common_memory_breakdown_print: |   - Host                     |                    912 =   704 +       0 +     207                |",
    "0.00.1 I common_memory_breakdown_print: |   - CPU_REPACK               |                  45182 = 45182 +       0 +       0                |",
    "0.00.1 I common_params_fit_impl: projected to use 13 MiB of host memory vs. 24105 MiB of total host memory",
    HEAD,
    "0.00.1 I common_memory_breakdown_print: |   - Host                     |                      1 =     1 +       0 +       0                |",
]  # fmt: skip


def spec(*command, gpus=(), room=0):
    return {"name": "chat", "command": list(command), "environment": {"CUDA_VISIBLE_DEVICES": "GPU-1"},
            "groups": ["render"], "gpus": list(gpus), "room_bytes": room}  # fmt: skip


@pytest.fixture
def host(tmp_path, monkeypatch):
    """systemd-run that runs what is behind its `--`, and systemctl that does nothing; both note their arguments."""
    for name, then in {
        "systemd-run": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
        "systemctl": "exit 0",
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n{then}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return tmp_path


def server(folder, lines, then="exec sleep 60"):
    """A program that prints the lines and then loads for ever, or what it does else."""
    path = folder / "llama-server"
    path.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + f"\nEND\n{then}\n")
    path.chmod(0o755)
    return str(path)


WITH_DRAFT = [
    HEAD,
    "0.00.1 I common_memory_breakdown_print: |   - CUDA0 (RTX 4090 (24 GB)) | 24105 = 24105 + (19413 = 14550 +    4644 +     219) +      -19413 |",
    "0.00.1 I common_memory_breakdown_print: |   - Host                     |                    912 =   704 +       0 +     207                |",
    "0.00.1 I operator(): getting device memory data for the extra model at a context size of 8192:",
    HEAD,
    "0.00.1 I common_memory_breakdown_print: |   - CUDA0 (RTX 4090 (24 GB)) | 24105 = 24105 + (14628 = 14550 +      32 +      46) +      -14628 |",
    "0.00.1 I common_memory_breakdown_print: |   - Host                     |                    720 =   704 +       0 +      16                |",
    "0.00.1 I common_params_fit_impl: projected to use 19491 MiB of device memory vs. 24105 MiB of free device memory",
]  # fmt: skip
UNMEASURED = [
    *WITH_DRAFT[:4],
    "0.00.1 W operator(): failed to measure the memory of the extra model, fitting without it: failed to create llama_context from model",
    *WITH_DRAFT[4:],
]  # fmt: skip
OWN = {"CUDA0": 19413 * MIB, "Host": 912 * MIB}


@pytest.mark.parametrize(
    ("lines", "beside", "told"),
    [
        (WITH_DRAFT, "draft", {**OWN, "beside CUDA0": 14628 * MIB, "beside Host": 720 * MIB}),
        (WITH_DRAFT, "head", {**OWN, "beside CUDA0": 78 * MIB, "beside Host": 16 * MIB}),
        (WITH_DRAFT, "", OWN),
        (UNMEASURED, "draft", OWN),
        (WITH_DRAFT[:3], "draft", OWN),
    ],
    ids=["a draft", "a head, whose weights are the model's", "nothing beside", "a draft that needs the model", "cut"],
)
def test_what_guesses_is_read_too(lines, beside, told):
    assert verify.read(lines, beside)[0] == told


def test_what_guesses_counts_on_its_device():
    question = {"limits": {"GPU0": 9, "host": 9}, "devices": {"CUDA0": "GPU0"}}
    assert verify.by_device({"CUDA0": 5, "Host": 1, "beside CUDA0": 3, "beside Host": 2}, question) == {
        "GPU0": 8,
        "host": 3,
    }


def test_the_first_breakdown_is_read_and_the_server_ended(host):
    told = verify.ask(spec(server(host, TWO_DEVICES)))
    assert told["told"] == {
        "CUDA0": 19413 * MIB, "CUDA1": 1413 * MIB, "Host": 912 * MIB, "CPU_REPACK": 45182 * MIB,
    }  # fmt: skip
    calls = (host / "calls").read_text().splitlines()
    assert calls[-1] == "systemctl kill --signal=KILL llamafleet-verify-chat.service"


def test_what_a_projector_takes_is_read_too(host):
    line = "0.00.005.1 I srv    load_model: [mtmd] estimated worst-case memory usage of mmproj is 943.75 MiB (took 9.01 ms)"
    told = verify.ask(spec(server(host, [line, *TWO_DEVICES])))["told"]
    assert told["projector"] == 943 * MIB + MIB * 3 // 4
    assert told["Host"] == 912 * MIB
    # Without the rows of the model it is no answer.
    assert verify.ask(spec(server(host, [line], then="exit 1")))["told"] is None


def test_a_split_that_is_not_measured_is_not_loaded(host):
    """llama-server would go on, and load the model on the GPUs that serve."""
    line = "W common_fit_params: failed to fit params: llama_params_fit is not implemented for SPLIT_MODE_TENSOR, abort"
    began = time.monotonic()
    told = verify.ask(spec(server(host, ["0.00.0 I loading", line], then="sleep 30")))
    assert time.monotonic() - began < 20
    assert (told["told"], told["rejected"]) == (None, "")
    assert told["why"] == "llama.cpp does not measure --split-mode tensor before it loads"


def test_it_runs_as_the_service_s_user_within_limits(host):
    verify.ask(spec(server(host, TWO_DEVICES), "--ctx-size", "512"))
    [called] = [line for line in (host / "calls").read_text().splitlines() if line.startswith("systemd-run")]
    for wanted in ("User=llamafleet", "MemoryMax=4294967296", "RuntimeMaxSec=120", "NoNewPrivileges=yes",
                   "SupplementaryGroups=render", "--unit=llamafleet-verify-chat.service", "--collect"):  # fmt: skip
        assert wanted in called
    assert "--setenv=CUDA_VISIBLE_DEVICES=GPU-1" in called and called.endswith("--ctx-size 512")


def test_systemd_replaces_no_variable_in_the_question():
    assert verify.command(spec("/bin/llama-server", "--model", "/m/a$HOME.gguf"))[-1] == "/m/a$$HOME.gguf"


@pytest.mark.parametrize(
    "line",
    [
        "error: invalid argument: --what",
        'error while handling argument "--temp": stof',
        "0.00.1 E llama_model_load: error loading model: unknown model architecture: 'what'",
        "0.00.1 E common_chat_verify_template: failed to apply template: std::exception",
    ],
)
def test_what_the_service_would_end_with_too_is_told_as_rejected(host, line):
    told = verify.ask(spec(server(host, ["0.00.0 I loading", line, "", *["more"] * 20], "exit 1")))
    assert told["told"] is None and told["rejected"] == line


def test_no_room_and_an_end_for_no_known_reason_are_no_rejection(host):
    for line in ("error loading model: CUDA error: out of memory", "static assets path not found: /nosuch"):
        assert verify.ask(spec(server(host, [line], "exit 1")))["rejected"] == ""
    assert verify.ask(spec(server(host, ["usage: none of it", *TWO_DEVICES])))["rejected"] == ""


@pytest.mark.parametrize(
    ("said", "room"),
    [
        ("error: invalid argument: --what", True),
        ("CUDA error: out of memory", False),
        ("ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory", False),
    ],
)
def test_a_server_that_ends_without_telling(host, said, room):
    told = verify.ask(spec(server(host, [said], "exit 1")))
    assert told["told"] is None and said in told["why"] and told["room"] is room


def test_a_breakdown_without_the_host_is_none(host):
    told = verify.ask(spec(server(host, TWO_DEVICES[:3], "exit 0")))
    assert told["told"] is None


class Nvml(types.ModuleType):
    """NVML of one GPU with so much free memory."""

    class NVMLError(Exception):
        pass

    def __init__(self, free):
        super().__init__("pynvml")
        self.free = free

    def nvmlInit(self):
        if self.free is None:
            raise self.NVMLError("no driver")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(free=self.free)


def test_a_gpu_without_room_is_not_touched(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(700 * MIB))
    told = verify.ask(spec(server(host, TWO_DEVICES), gpus=["GPU-1"], room=768 * MIB))
    assert told["told"] is None and told["room"] is False
    assert "GPU-1 has 700 MiB free" in told["why"] and "768 MiB" in told["why"]
    assert not (host / "calls").exists()


@pytest.mark.parametrize("free", [768 * MIB, None], ids=["enough", "nvml_does_not_tell"])
def test_a_gpu_with_room_is_asked(host, monkeypatch, free):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(free))
    assert verify.ask(spec(server(host, TWO_DEVICES), gpus=["GPU-1"], room=768 * MIB))["told"]


def test_as_a_program_it_prints_one_object(host):
    asked = json.dumps(spec(server(host, TWO_DEVICES)))
    done = subprocess.run([sys.executable, verify.__file__, "ask", asked], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) == {"told", "why", "room", "rejected"}


@pytest.mark.oracle
def test_the_real_server_tells_its_memory_and_does_not_load(host, tmp_path):
    from sandbox import models, oracle

    built = oracle.build()
    model = models.weightless(tmp_path, "Llama-3.2-3B", "")
    with oracle.rpc_server(1) as endpoint:
        argv = [str(built.llama_server), "--model", str(model), "--rpc", endpoint, "--ctx-size", "4096",
                "--parallel", "1", "--n-gpu-layers", "10", "--fit", "off"]  # fmt: skip
        found = verify.ask(spec(*question(argv)))
    assert set(found["told"]) >= {"RPC0", "Host"} and found["told"]["RPC0"] > 100 * MIB
    assert sum(found["told"].values()) > model.stat().st_size


# --- in the switch --------------------------------------------------------------------------------


def settle(folder, command, limits, capsys):
    """(exit status, plan.json afterwards, what was printed)"""
    asked = {**spec(command), "devices": {"CUDA0": "GPU0", "CUDA1": "GPU3"}, "limits": limits}
    (folder / "question.json").write_text(json.dumps(asked))
    (folder / "plan.json").write_text(json.dumps({"name": "chat", "verified": {"ledger_bytes": {"GPU0": 1}}}))
    code = verify.main(["settle", str(folder / "question.json"), str(folder / "plan.json")])
    return code, json.loads((folder / "plan.json").read_text()), capsys.readouterr().out


HELD = {"GPU0": 19413 * MIB, "GPU3": 1413 * MIB, "host": (912 + 45182) * MIB}


def test_in_the_switch_what_is_told_goes_into_the_plan(host, capsys):
    code, plan, _ = settle(host, server(host, TWO_DEVICES), HELD, capsys)
    assert code == 0
    assert plan["verified"] == {"ledger_bytes": {"GPU0": 1}, "binary_bytes": HELD, "why": "asked in the switch"}


def test_in_the_switch_arguments_that_are_rejected_fail_with_their_line(host, capsys):
    code, plan, out = settle(host, server(host, ["error: invalid argument: --what"], "exit 1"), HELD, capsys)
    assert code == switch.REJECTED and "error: invalid argument: --what" in out
    assert plan["verified"] == {"ledger_bytes": {"GPU0": 1}}


def test_in_the_switch_more_than_there_is_fails_with_what_was_told(host, capsys):
    code, _, out = settle(host, server(host, TWO_DEVICES), {**HELD, "GPU3": 1400 * MIB}, capsys)
    assert code == 1
    assert "GPU3: 1413 MiB, 1400 MiB are left under the reserve" in out
    [told] = [line for line in out.splitlines() if line.startswith("told: ")]
    assert json.loads(told.removeprefix("told: "))["CUDA1"] == 1413 * MIB


def test_in_the_switch_a_server_that_tells_nothing_is_the_gate_s(host, capsys):
    code, plan, out = settle(host, server(host, ["bad"], "exit 1"), HELD, capsys)
    assert code == 0 and "the gate decides" in out and "binary_bytes" not in plan["verified"]
