"""What the gate makes of llama-server's own words about its devices' memory; the logs are real ones of b11434."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from llamafleet.remote import gate_devices

LOGS = Path(__file__).parent / "gate_logs"
MIB = 1 << 20
# As planned for the model of the logs: sandbox.models' "dense", 1024 tokens, all on one device.
GPU = {"name": "llvmpipe", "device": "Vulkan0", "weights_bytes": 4989952, "kv_bytes": 2 * MIB,
       "compute_bytes": 23592960, "staging_bytes": 0}  # fmt: skip
SPEC = {"unit": "llama-server-tiny.service", "gpus": [GPU]}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host whose journal holds a log for each start; `told(log)` checks a new one."""
    journals = {}
    monkeypatch.setattr(gate_devices, "KEPT", str(tmp_path))
    monkeypatch.setattr(gate_devices.reported, "__defaults__", (0.0,))  # of JOURNAL_SECONDS
    monkeypatch.setattr(gate_devices, "invocation", lambda unit: f"start{len(journals)}")
    monkeypatch.setattr(gate_devices, "journal", lambda start: journals.get(start, ""))

    class Host:
        def logs(self, text):
            journals[f"start{len(journals) + 1}"] = text

        def forgets(self):
            journals.update(dict.fromkeys(journals, ""))

        def told(self, log, spec=SPEC):
            self.logs((LOGS / log).read_text() if log.endswith(".log") else log)
            return gate_devices.check_devices(spec)

    return Host()


def test_a_device_that_holds_the_plan_is_good(host):
    found = host.told("vulkan.log")
    assert (found["name"], found["ok"]) == ("devices", True)
    assert "Vulkan0" in found["expected"] and "MiB on Vulkan0" in found["found"]


def test_the_silent_fallback_to_the_cpu_is_named(host):
    found = host.told("cpu.log")
    assert found["ok"] is False
    # The log itself says "offloaded 5/5 layers to GPU", of a build that has none.
    assert found["expected"] == "6 MiB of weights and cache on Vulkan0 (llvmpipe), 29 MiB with compute"
    assert found["found"] == "9 MiB on CPU, 5 MiB on CPU_Mapped"
    assert "runs, in part at least, on the CPU" in found["hint"] and "hardening hides the device" in found["hint"]


def test_every_device_is_looked_at(host):
    two = {**SPEC, "gpus": [GPU, {**GPU, "device": "Vulkan1", "name": "second"}]}
    found = host.told("vulkan.log", two)
    assert found["ok"] is False and "Vulkan1 (second)" in found["expected"]


def test_less_than_planned_is_a_fallback_in_part(host):
    more = {**SPEC, "gpus": [{**GPU, "weights_bytes": 20 * MIB}]}
    assert host.told("vulkan.log", more)["ok"] is False


@pytest.mark.parametrize(("mib", "ok"), [(7.0, True), (4.0, True), (2.0, False), (400.0, False)])
def test_one_name_stands_for_all_gpus_that_split_tensors(host, mib, ok):
    """The plan's figures are upper bounds there; what is held by nobody is on the CPU."""
    two = {**SPEC, "gpus": [GPU, {**GPU, "device": "Vulkan1", "name": "second"}]}
    log = f"x: Meta() model buffer size = {mib} MiB\nx: Meta() KV buffer size = 0.00 MiB\nmodel loaded\n"
    assert host.told(log, two)["ok"] is ok


def test_more_than_planned_is_named_too(host):
    log = "x: Vulkan0 model buffer size = 9000.00 MiB\nx: Vulkan0 KV buffer size = 2.00 MiB\nmodel loaded\n"
    found = host.told(log)
    assert found["ok"] is False and "allocates more than was planned" in found["hint"]


def test_a_plan_without_gpus_asks_nothing(host):
    assert host.told("", {**SPEC, "gpus": []}) is None


def test_a_journal_that_keeps_nothing_is_no_proof_of_health(host):
    found = host.told("")
    assert found["ok"] is False and "journald" in found["hint"]


def test_a_log_that_is_not_complete_yet_is_not_believed(host):
    text = (LOGS / "vulkan.log").read_text()
    assert host.told(text[: text.index("compute buffer size")])["ok"] is False


def test_what_was_read_outlives_the_journal_but_not_the_start(host):
    assert host.told("vulkan.log")["ok"] is True
    host.forgets()
    assert gate_devices.check_devices(SPEC)["ok"] is True
    assert host.told("cpu.log")["ok"] is False  # the same unit, started again


def test_parts_are_summed_and_a_second_reserve_counts_once():
    log = """0.1 I load_tensors:      CUDA0 model buffer size =  100.00 MiB
0.1 I load_tensors:      CUDA0 model buffer size =   50.00 MiB
0.2 I llama_kv_cache:      CUDA0 KV buffer size =   10.00 MiB
0.2 I llama_kv_cache:      CUDA0 KV buffer size =    5.00 MiB
0.2 I llama_memory_recurrent:      CUDA0 RS buffer size =    1.00 MiB
0.3 I sched_reserve:      CUDA0 compute buffer size =   99.00 MiB
0.4 I sched_reserve:      CUDA0 compute buffer size =    7.00 MiB
0.4 I sched_reserve:  CUDA_Host compute buffer size =    3.00 MiB
"""
    cuda = {"weights": 150.0 * MIB, "context": 16.0 * MIB, "compute": 7.0 * MIB}
    assert gate_devices.parse(log) == {"CUDA0": cuda, "CUDA_Host": {"compute": 3.0 * MIB}}


def test_a_server_that_missed_its_device_says_which(host):
    host.logs((LOGS / "hidden.log").read_text())
    assert gate_devices.cause_of_end(SPEC["unit"]).startswith("llama-server has no device Vulkan0: the release")
    told = "devices: expected 6 MiB on Vulkan0, found 9 MiB on CPU (the CPU)"
    host.logs(f"0.1 I srv  llama_server: model loaded\n{told}\nControl process exited\n")
    assert gate_devices.cause_of_end(SPEC["unit"]) == told
    host.logs("error: the model file is damaged\n")
    assert gate_devices.cause_of_end(SPEC["unit"]) == ""


def test_the_journal_is_asked_for_this_start_alone(tmp_path, monkeypatch):
    program = tmp_path / "journalctl"
    program.write_text('#!/bin/sh\nprintf \'%s\\n\' "$@" >"$CASE/asked"; printf "a\\377b\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CASE", str(tmp_path))
    assert gate_devices.journal("0123abcd") == "a�b\n"
    assert "_SYSTEMD_INVOCATION_ID=0123abcd" in (tmp_path / "asked").read_text().splitlines()


def test_what_is_kept_is_json_of_that_start(host, tmp_path):
    host.told("vulkan.log")
    kept = json.loads((tmp_path / "devices-llama-server-tiny.service.json").read_text())
    assert kept["start"] == "start1" and kept["devices"]["Vulkan0"]["weights"] > 4 * MIB


def test_systemd_that_cannot_be_asked_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        gate_devices.invocation("llama-server-tiny.service")


def test_a_projector_s_buffers_are_not_the_model_s(host):
    lines = (LOGS / "vulkan.log").read_text().splitlines()
    ours = [n for n, line in enumerate(lines) if "compute buffer size" in line][-1]
    clip = "I reserve_compute_meta:    Vulkan0 compute buffer size = 4096.00 MiB"
    with_projector = "\n".join([*lines[: ours + 1], clip, *lines[ours + 1 :]])
    assert host.told("vulkan.log")["found"] == host.told(with_projector)["found"]
    assert host.told(with_projector)["ok"]
