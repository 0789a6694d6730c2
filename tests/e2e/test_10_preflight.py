"""The unit's hardening is tried on the host before the switch. A library that every llama-server loads there stands
for a driver that does not work under this or that directive."""

import json
import shutil
import subprocess

import pytest

from tests.e2e.deploying import main_pid, on, pyinfra, serves

UNIT = "/etc/systemd/system/llama-server-tiny.service"
PLAN = "/etc/llamafleet/instances/tiny/plan.json"
LIBRARY, NEEDS = "/usr/lib/libneedy.so", "/etc/needs"
SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/resource.h>
static void refuse(const char *what) { dprintf(2, "driver: error: %s\n", what); _exit(77); }
__attribute__((constructor)) static void need(void) {
    char text[256] = {0};
    FILE *file;
    if (strcmp(program_invocation_short_name, "llama-server") || !(file = fopen("/etc/needs", "r"))) return;
    if (fgets(text, sizeof text, file) == NULL) text[0] = 0;
    fclose(file);
    if (strstr(text, "code") && mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        == MAP_FAILED) refuse("no memory for generated code");
    if (strstr(text, "priority") && setpriority(PRIO_PROCESS, 0, 1)) refuse("the priority cannot be set");
    if (strstr(text, "luck")) refuse("no luck");
}
"""
CODE, PRIORITY = "MemoryDenyWriteExecute=yes", "SystemCallFilter=~@resources"


@pytest.fixture(scope="module")
def host(hosts, tmp_path_factory):
    """The host that is deployed already, with the library."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc here to make the library with")
    folder = tmp_path_factory.mktemp("needy")
    (folder / "needy.c").write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "needy.so", folder / "needy.c"], check=True)
    one = hosts[2]
    subprocess.run([*one.ssh(), "--", f"cat > {LIBRARY}"], input=(folder / "needy.so").read_bytes(), check=True)
    on(one, "sh", "-c", f"chmod 755 {LIBRARY}; echo {LIBRARY} > /etc/ld.so.preload")
    yield one
    on(one, "rm", "-f", "/etc/ld.so.preload", NEEDS, LIBRARY)


@pytest.fixture
def deploy(settings, inventory, host):
    """Deploys with a context and what the library needs; returns the run, the unit and plan.json's preflight."""

    def run(needs, context, *options):
        on(host, "sh", "-c", f"echo '{needs}' > {NEEDS}")
        done = pyinfra(inventory((host, settings(host, model={"context_tokens": context}))), *options)
        return done, on(host, "cat", UNIT), json.loads(on(host, "cat", PLAN))["preflight"]

    return run


def dropped(found):
    return [line for one in found["dropped"] for line in one["directives"]]


def test_where_everything_works_the_whole_hardening_is_kept(deploy, host):
    run, unit, found = deploy("nothing", 512)
    assert run.code == 0, run.text
    assert dropped(found) == [] and found["checked"] == ["list-devices", "completion"]
    assert "Dropped" not in unit and serves(host)


def test_inside_there_is_no_shell_and_nothing_of_ours_to_read(host):
    """Asked of the running process' own view of the file system, after the whole hardening was kept."""
    pid = main_pid(host, "tiny")
    said = host.run(["nsenter", f"--target={pid}", "--mount", "/bin/sh", "-c", "echo in"])
    assert said.returncode != 0 and "Permission denied" in said.stderr, said.stderr
    for folder in ("/etc/llamafleet", "/var/lib/llamafleet/good", "/var/log", "/root"):
        assert on(host, "ls", "-A", folder) != ""
        assert on(host, "ls", "-A", f"/proc/{pid}/root{folder}") == ""
    models = f"/proc/{pid}/root/var/lib/llamafleet/models"
    assert "tiny" in on(host, "ls", models)
    assert host.run(["touch", f"{models}/x"]).stderr.endswith("Read-only file system\n")


def test_what_breaks_it_is_dropped_alone_and_told(deploy, host):
    run, unit, found = deploy("code", 768)
    assert run.code == 0, run.text
    assert dropped(found) == [CODE] and "no memory for generated code" in found["dropped"][0]["why"]
    assert f"hardening without {CODE}" in run.text and "no memory for generated code" in run.text
    assert f"\n# Dropped by the preflight (see plan.json): {CODE}\n" in unit
    shown = on(host, "systemctl", "show", "--property=MemoryDenyWriteExecute,PrivateUsers", "llama-server-tiny")
    assert shown.split() == ["PrivateUsers=yes", "MemoryDenyWriteExecute=no"] and serves(host)
    again, _, _ = deploy("code", 768)
    assert again.code == 0 and again.changed() == [], again.text


@pytest.mark.long
def test_two_that_break_it_are_dropped_together_and_no_more(deploy, host):
    run, _, found = deploy("code priority", 1024)
    assert run.code == 0, run.text
    assert dropped(found) == [CODE, PRIORITY]
    assert "the priority cannot be set" in found["dropped"][1]["why"] and serves(host)


# In plan.json, and in the copy that passed the gate, with its sum.
OLD_KERNEL = """
for file in "$2/plan.json" "$1"; do
    before=$(sha256sum <"$file" | cut -c -64)
    sed -i 's/"kernel": "[^"]*"/"kernel": "4.19.0-old"/' "$file"
    sed -i "s/$before/$(sha256sum <"$file" | cut -c -64)/" "$2/manifest.json"
done
"""


@pytest.mark.long
def test_on_other_ground_the_whole_hardening_is_tried_again(deploy, host):
    context = json.loads(on(host, "cat", PLAN))["gate"]["context_tokens"]
    # As after an upgrade: what was found was found under another kernel.
    on(host, "sh", "-ec", OLD_KERNEL, "sh", PLAN, "/var/lib/llamafleet/good/tiny")
    run, _, _ = deploy("nothing", context, "--dry")
    assert "its hardening was loosened under another kernel" in run.text
    run, unit, found = deploy("nothing", context)
    assert run.code == 0, run.text
    assert dropped(found) == [] and f"\n{CODE}\n" in unit and serves(host)


def test_where_nothing_works_the_old_service_is_not_touched(deploy, host):
    before, unit = main_pid(host, "tiny"), on(host, "cat", UNIT)
    run, now, _ = deploy("luck", 2048)
    assert run.code != 0 and host.name in run.text
    assert "llama-server does not work on this host, even without hardening" in run.text and "no luck" in run.text
    assert (main_pid(host, "tiny"), now) == (before, unit) and serves(host)
