"""The built llama-server is asked before it is trusted, and what drifts on a host does not change its plan.

The commit that is built here counts so many MiB more of host memory as a file on the host says.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox import upstream
from tests.e2e.deploying import ROOT, main_pid, on, pyinfra, serves

MIB = 2**20
EXTRA = "/etc/llama-extra-mib"
BEFORE = "    // print memory breakdown for host:\n"
COUNTS_MORE = f"""\
    if (FILE * extra = fopen("{EXTRA}", "r")) {{
        long mib = 0;
        if (fscanf(extra, "%ld", &mib) == 1) {{ mb_host.compute += (size_t) mib * MiB; }}
        fclose(extra);
    }}
"""


@pytest.fixture(scope="module")
def host(builder):
    return builder


@pytest.fixture(scope="module")
def commit(outside):
    source = upstream.read_file(outside.clone, "common/fit.cpp")
    assert BEFORE in source
    changed = source.replace(BEFORE, COUNTS_MORE + BEFORE)
    return upstream.add_commit(outside.clone, {"common/fit.cpp": changed}, "counts-more")


@pytest.fixture(scope="module")
def story():
    """What one test leaves for the next: the MiB that the unchanged binary counts beyond the ledger."""
    return {}


@pytest.fixture
def written(settings, inventory, host, commit):
    """An inventory of the one host; slots and context give the KV cache a size that matters: 64 MiB of f16."""

    def make(model=None, **overrides):
        asked = {"context_tokens": 8192, "slots": 4, "ubatch_tokens": 512, "kv_types": ["f16", "q8_0"], **(model or {})}
        return inventory((host, settings(host, llama_cpp_ref=commit, model=asked, **overrides)))

    return make


def counts(host, mib):
    on(host, "sh", "-c", f"echo {mib} > {EXTRA}")


def record(host):
    return json.loads(on(host, "cat", "/etc/llamafleet/instances/tiny/plan.json"))


def planned(inventory):
    """The host's row of the plan's ledger, in MiB."""
    program = Path(sys.executable).with_name("llamafleet")
    words = [program, "plan", "--inventory", str(inventory), "--json"]
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [told] = json.loads(done.stdout).values()
    row = told["models"]["tiny"]["ledger"][-1]
    return {key: value / MIB for key, value in row.items() if key != "device"}


def unchanged(run, host):
    assert run.code == 0, run.text
    assert run.changed(host.name) == [], run.text


def test_what_the_binary_counts_beyond_the_ledger_is_in_the_plan(written, host, story):
    counts(host, 300)
    run = pyinfra(written())
    assert run.code == 0, run.text
    assert "planned again with the binary's numbers (2 rounds)" in run.text
    assert serves(host)
    said = record(host)["verified"]
    more = said["binary_bytes"]["host"] - said["ledger_bytes"]["host"]
    story["beyond"] = more // MIB - 300
    assert abs(story["beyond"]) < 32 and said["extra_bytes"] == {"host": more}
    row = record(host)["plan"]["ledger"][-1]
    counted = row["weights_bytes"] + row["kv_bytes"] + row["compute_bytes"]
    assert counted == said["binary_bytes"]["host"]
    limit = int(on(host, "systemctl", "show", "--property=MemoryMax", "--value", "llama-server-tiny.service"))
    assert limit > counted + row["overhead_bytes"] + 1024 * MIB


def test_a_second_run_asks_nothing_and_changes_nothing(written, host):
    dry = pyinfra(written(), "--dry", "-v")
    unchanged(dry, host)
    assert "kept: the same inputs give the installed plan" in dry.text
    before = main_pid(host, "tiny")
    run = pyinfra(written())
    unchanged(run, host)
    assert "llama-server would allocate" not in run.text
    assert main_pid(host, "tiny") == before


def test_asking_leaves_nothing_behind(host):
    listed = on(host, "systemctl", "list-units", "--all", "--no-legend", "llamafleet-verify-*")
    assert listed == ""
    processes = on(host, "sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c '[-]lv 4'; true")
    assert processes == "0"


def test_what_does_not_fit_by_the_binary_s_numbers_is_refused_and_the_old_one_serves(written, host):
    before, installed = main_pid(host, "tiny"), record(host)
    counts(host, 10_000_000)
    run = pyinfra(written({"slots": 3}))
    assert run.code != 0
    [line] = [line for line in run.text.splitlines() if "refused: models: tiny" in line]
    assert host.name in line and "MiB of RAM needed" in line
    assert main_pid(host, "tiny") == before and record(host) == installed
    assert serves(host)


def test_the_next_best_plan_is_taken_where_the_best_does_not_fit_after_all(written, host, story):
    reserve = (
        2048 + int(planned(written({"slots": 3}))["free_bytes"]) - 10
    )  # 10 MiB are left with f16; q8_0 saves about 20
    counts(host, 25 - story["beyond"])
    tight = written({"slots": 3}, ram_reserve_mib=reserve)
    run = pyinfra(tight)
    assert run.code == 0, run.text
    assert "tiny: planned again: --cache-type-k q8_0 --cache-type-v q8_0" in run.text
    assert "--cache-type-k\0q8_0" in on(host, "cat", f"/proc/{main_pid(host, 'tiny')}/cmdline")
    assert serves(host)
    unchanged(pyinfra(tight, "--dry"), host)


def test_drift_of_memory_keeps_the_plan_and_other_hardware_does_not(written, host, story):
    counts(host, -story["beyond"])
    row = planned(written())
    total = row["capacity_bytes"]
    tight = written(ram_reserve_mib=2048 + int(row["free_bytes"]))  # less than one MiB is left
    assert pyinfra(tight).code == 0
    assert record(host)["plan"]["argv"][record(host)["plan"]["argv"].index("--cache-type-k") + 1] == "f16"
    try:
        sees(host, total - 4)
        dry = pyinfra(tight, "--dry")
        unchanged(dry, host)
        assert "kept: the installed plan still fits (host -4 MiB)" in dry.text
        unchanged(pyinfra(tight), host)
        sees(host, total * 0.97)
        dry = pyinfra(tight, "--dry")
        assert "refused: models: tiny" in dry.text and serves(host)
    finally:
        sees(host, None)


@pytest.mark.long
def test_settings_that_give_the_same_service_restart_nothing(written, host):
    before = main_pid(host, "tiny")
    run = pyinfra(written())  # another reserve than installed with, and the same flags
    assert run.code == 0
    assert main_pid(host, "tiny") == before
    unchanged(pyinfra(written(), "--dry"), host)


def sees(host, mib):
    """Let the host see so much memory in all; None: what the machine has."""
    on(host, "sh", "-c", "while umount /proc/meminfo 2>/dev/null; do :; done; cat /proc/meminfo > /run/meminfo")
    if mib is not None:
        change = '{ if ($1 == "MemTotal:") $2 = ' + str(int(mib * 1024)) + "; print }"
        on(host, "sh", "-c", f"awk '{change}' /run/meminfo > /run/meminfo.new && mv /run/meminfo.new /run/meminfo"
                             " && mount --bind /run/meminfo /proc/meminfo")  # fmt: skip


# --- llamafleet status ----------------------------------------------------------------------------


def status(inventory, *options):
    program = Path(sys.executable).with_name("llamafleet")
    words = [program, "status", "--inventory", str(inventory), *options]
    return subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_status_of_a_host_as_it_should_be(written, host):
    asked = written()
    done = status(asked, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    [told] = json.loads(done.stdout).values()
    one = told["instances"]["tiny"]
    assert one["state"] == "active" and one["drift"] == [] and one["verified"] is True
    assert one["rss_bytes"] > 4 * MIB and one["release"] == record(host)["release"]
    table = status(asked)
    assert table.returncode == 0
    assert "8192 x 4 f16, CPU, cpu" in table.stdout and host.name in table.stdout


def test_status_names_what_drifted_and_who_cannot_be_reached(written, settings, inventory, host, hosts):
    unit = "/etc/systemd/system/llama-server-tiny.service"
    on(host, "sh", "-c", f"cp {unit} /run/unit && echo '# by hand' >> {unit} && systemctl daemon-reload")
    before = main_pid(host, "tiny")
    try:
        done = status(written())
        assert done.returncode == 1
        assert "its unit differs in lines that need no restart" in done.stdout
    finally:
        on(host, "sh", "-c", f"cp /run/unit {unit} && systemctl daemon-reload")
    assert main_pid(host, "tiny") == before  # read only
    lost = next(one for one in hosts if one is not host)
    gone = inventory((host, settings(host)), (lost, {**settings(lost), "ssh_port": 9, "ssh_connect_retries": 0}))
    done = status(gone)
    assert done.returncode == 1
    assert f"{lost.name}: cannot be reached" in done.stdout


@pytest.mark.long
def test_a_report_shows_what_runs_and_what_its_gate_measured(written, host, tmp_path):
    program, page = Path(sys.executable).with_name("llamafleet"), tmp_path / "report.html"
    words = [program, "report", "--inventory", str(written()), "--output", str(page)]
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{page}: 1 host, 1 as they should be\n"
    text = page.read_text()
    assert host.name in text and "8192 x 4 f16, CPU, cpu" in text and "tokens/s written, by its gate" in text
    assert "Memory of tiny on" in text and "measured by the gate: " in text and "predicted: " in text
