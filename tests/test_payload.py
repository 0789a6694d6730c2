"""What travels to a host: the right files, the same bytes each time, and nothing left behind there."""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import common
import pytest

from llamafleet import payload
from llamafleet.payload import PayloadError
from tests.fake_nvml import build

PYTHON = "/usr/bin/python3"  # the host's: it has none of our packages


@pytest.fixture(scope="module")
def probe_zip():
    return payload.probe_zip(os.uname().machine)


def names(data):
    return zipfile.ZipFile(io.BytesIO(data)).namelist()


# --- wheels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", payload.ARCHITECTURES)
def test_one_wheel_for_each_locked_package(arch):
    found = payload.wheels(arch)
    assert len(found) == len(payload.read_lock(payload.LOCK)) == 2
    for wheel in found:
        kind = "py3-none-any" if not wheel.name.startswith("psutil") else "abi3"
        assert kind in wheel.name
    assert arch in next(wheel.name for wheel in found if wheel.name.startswith("psutil"))


def test_lock_names_no_index_and_pins_everything():
    text = payload.LOCK.read_text()
    assert "://" not in text
    for name, requirement in payload.read_lock(payload.LOCK).items():
        assert requirement.startswith(f"{name}==")
        assert "--hash=sha256:" in requirement


def without_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(payload.subprocess, "run", refuse)


def test_cached_wheels_need_no_network(monkeypatch):
    payload.wheels("x86_64")
    without_network(monkeypatch)
    assert len(payload.wheels("x86_64")) == 2


def fill(cache, *, spoil=None):
    """A copy of the cache for x86_64, one wheel spoilt."""
    for wheel in payload.wheels("x86_64"):
        place = cache / wheel.parent.name / wheel.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(wheel.read_bytes() + (b"x" if spoil and wheel.name.startswith(spoil) else b""))


def test_a_spoilt_wheel_is_fetched_again_and_not_used(tmp_path):
    fill(tmp_path, spoil="nvidia_ml_py")
    found = payload.wheels("x86_64", cache=tmp_path)
    assert [wheel.read_bytes() for wheel in found] == [wheel.read_bytes() for wheel in payload.wheels("x86_64")]
    assert all(wheel.is_relative_to(tmp_path) for wheel in found)


def test_unreachable_index_is_told_with_package_arch_and_next_step(tmp_path, monkeypatch):
    fill(tmp_path, spoil="psutil")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PayloadError) as error:
        payload.wheels("x86_64", cache=tmp_path)
    text = str(error.value)
    assert "psutil==" in text
    assert "x86_64" in text
    assert f"put the wheel into {tmp_path}" in text


def test_a_wheel_that_is_not_the_locked_one_is_refused(tmp_path):
    lock = tmp_path / "lock.txt"
    version = payload.read_lock(payload.LOCK)["nvidia-ml-py"].split()[0]
    lock.write_text(f"{version} --hash=sha256:{'0' * 64}\n")
    with pytest.raises(PayloadError, match="no wheel of nvidia-ml-py=="):
        payload.wheels("x86_64", lock=lock, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.whl")) == []


def test_pip_that_is_missing_here_is_named_with_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(payload.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PayloadError) as error:
        payload.wheels("x86_64", cache=tmp_path)
    text = str(error.value)
    assert text.startswith("pip is missing on this machine: ") and "-m ensurepip" in text and "uv pip install" in text


def test_unknown_architecture():
    with pytest.raises(PayloadError, match=r"'riscv64'.*x86_64 and aarch64"):
        payload.wheels("riscv64")


# --- zips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", payload.ARCHITECTURES)
def test_zips_are_the_same_each_time(arch):
    assert payload.probe_zip(arch) == payload.probe_zip(arch)
    assert payload.helpers_zip(arch) == payload.helpers_zip(arch)


def test_probe_zip_has_every_sibling_that_its_programs_import():
    siblings = {path.stem for path in payload.REMOTE.glob("*.py")}
    for program in payload.PROBE_PROGRAMS:
        tree = ast.walk(ast.parse((payload.REMOTE / program).read_text()))
        nodes = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
        imported = {name for node in nodes for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                                                        [alias.name for alias in node.names])}  # fmt: skip
        missing = {f"{name}.py" for name in imported & siblings} - set(payload.PROBE_PROGRAMS)
        assert not missing, (program, missing)


def test_probe_zip_is_small_and_has_what_the_probe_needs(probe_zip):
    found = set(names(probe_zip))
    assert {"probe.py", "probe_gpus.py", "pynvml.py", "psutil/__init__.py", "psutil/_pslinux.py"} <= found
    assert not [name for name in found if "test" in name or "pycache" in name or "dist-info" in name]
    assert len(probe_zip) < 260_000


def test_helpers_key_names_programs_and_lock(tmp_path, monkeypatch):
    before = payload.helpers_key()
    lock = tmp_path / "remote.txt"
    lock.write_text(payload.LOCK.read_text() + "# another\n")
    assert payload.helpers_key(lock) != before
    programs = tmp_path / "remote"
    shutil.copytree(payload.REMOTE, programs)
    monkeypatch.setattr(payload, "REMOTE", programs)
    assert payload.helpers_key() == before
    (programs / "probe.py").write_text("print('another')")
    assert payload.helpers_key() != before


def test_helpers_bring_the_sums_of_their_files(tmp_path):
    zipfile.ZipFile(io.BytesIO(payload.helpers_zip("x86_64"))).extractall(tmp_path)
    assert common.helpers_damage(str(tmp_path)) is None
    assert subprocess.run(["sha256sum", "--status", "-c", common.SUMS], cwd=tmp_path).returncode == 0
    listed = {line.split("  ")[1] for line in (tmp_path / common.SUMS).read_text().splitlines()}
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {*listed, common.SUMS}
    for name in ("gate.py", "psutil/__init__.py", common.SUMS):
        path = tmp_path / name
        content = path.read_bytes()
        for harm in (b"", b"\0" * len(content), None):
            path.unlink() if harm is None else path.write_bytes(harm)
            assert common.helpers_damage(str(tmp_path)) == str(path)
        path.write_bytes(content)
    assert common.helpers_damage(str(tmp_path)) is None
    assert common.helpers_damage(str(tmp_path / "none")) == str(tmp_path / "none" / common.SUMS)


def test_helpers_zip_has_every_program_and_package():
    found = set(names(payload.helpers_zip("x86_64")))
    programs = {path.name for path in payload.REMOTE.glob("*.py")} - {"__init__.py"}
    assert programs <= found
    packages = {"psutil", "pynvml.py"}
    assert packages <= {name.split("/")[0] for name in found}


def test_helpers_import_under_another_python(tmp_path):
    """Unpacked, everything works together for a Python that has none of it."""
    zipfile.ZipFile(io.BytesIO(payload.helpers_zip(os.uname().machine))).extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import psutil, pynvml; print(psutil.__file__)"
    result = subprocess.run([PYTHON, "-I", "-B", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(str(tmp_path))


# --- on the host -------------------------------------------------------------------------------


class Host:
    """A host's file system as far as the command sees it: places to unpack; and the zip that it is sent."""

    def __init__(self, folder, data, monkeypatch):
        self.folder, self.data, self.sent, self.places = folder, data, data, folder / "places"
        self.places.mkdir()
        monkeypatch.setattr(payload, "UNPACK_PLACES", (str(self.places),))
        self.environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}

    python = "python3"

    def start(self, *arguments, **more):
        digest = hashlib.sha256(self.data).hexdigest()
        command = payload.probe_command(digest, "probe.py", *arguments, python=self.python)
        return subprocess.Popen(
            command, env=self.environment | more, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, preexec_fn=heed_signals,  # noqa: PLW1509 -- it takes no lock
        )  # fmt: skip

    def run(self, *arguments, **more):
        process = self.start(*arguments, **more)
        output, errors = process.communicate(self.line, timeout=60)
        return process.returncode, output, errors

    @property
    def line(self):
        return base64.b64encode(self.sent).decode() + "\n"

    def traces(self):
        return sorted(str(path) for path in self.places.rglob("*"))


@pytest.fixture
def host(tmp_path, probe_zip, monkeypatch):
    return Host(tmp_path, probe_zip, monkeypatch)


def test_runs_under_a_python_without_our_packages_and_leaves_nothing(host):
    code, output, errors = host.run("--paths", "/", "/srv/a b; exit 9")
    assert (code, errors) == (0, "")
    found = json.loads(output)
    version = subprocess.run([PYTHON, "-V"], capture_output=True, text=True, check=True).stdout
    assert found["python"] == version.split()[1]
    assert [disk["path"] for disk in found["disks"]] == ["/", "/srv/a b; exit 9"]
    assert host.traces() == []


def test_the_probes_exit_code_is_passed_on(host):
    code, output, errors = host.run("--nonsense")
    assert (code, output) == (2, "")
    assert "--nonsense" in errors
    assert host.traces() == []


def test_no_python_on_the_host(host, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "rm", "mktemp", "chmod"):
        (tools / name).symlink_to(Path("/bin", name))
    code, output, errors = host.run(PATH=str(tools))
    assert (code, output, errors) == (127, "", payload.PYTHON_MISSING + "\n")
    assert host.traces() == []


def test_python_too_old(host, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.6.8\nexit 1\n')
    (tools / "python3").chmod(0o755)
    code, output, errors = host.run(PATH=f"{tools}:/usr/bin:/bin")
    assert (code, output, errors) == (127, "", f"{payload.PYTHON_OLD} Python 3.6.8\n")
    assert host.traces() == []


def test_a_python_that_is_named_is_used_where_the_system_s_is_too_old(host, tmp_path):
    """RHEL 8 and Ubuntu 20.04 have an old python3, and a newer one beside it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/python3").chmod(0o755)
    host.python = PYTHON
    code, output, errors = host.run(PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert (code, errors) == (0, "") and json.loads(output)["package_manager"] == "apt"


def test_a_python_that_is_named_and_not_there(host):
    host.python = "/usr/bin/python9"
    code, _, errors = host.run()
    assert (code, errors) == (127, f"{payload.PYTHON_MISSING}: the setting python names /usr/bin/python9\n")


def test_spoilt_zip(host):
    host.data = host.sent = b"not a zip"
    code, output, errors = host.run()
    assert (code, output) == (125, "")
    assert "BadZipFile" in errors
    assert host.traces() == []


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b"", lambda data: data + b"x"])
def test_what_is_not_what_was_sent_is_not_unpacked(host, spoil):
    host.sent = spoil(host.data)
    code, output, errors = host.run()
    assert (code, output) == (125, "")
    assert "another SHA-256 than what was sent" in errors
    assert host.traces() == []


def test_places_that_do_not_serve_are_passed_over(host, monkeypatch):
    monkeypatch.setattr(payload, "UNPACK_PLACES", ("/proc", "/nowhere", "$HOME"))
    code, output, _ = host.run()
    assert (code, json.loads(output)["schema"]) == (0, 1)
    assert sorted(path.name for path in host.folder.iterdir()) == ["places"]


def test_nowhere_to_unpack(host, monkeypatch):
    monkeypatch.setattr(payload, "UNPACK_PLACES", ("/proc", "/nowhere"))
    code, _, errors = host.run()
    assert code == 126
    assert "nowhere to unpack" in errors
    assert host.traces() == []


def test_without_a_home_the_root_directory_is_no_place(host, monkeypatch):
    monkeypatch.setattr(payload, "UNPACK_PLACES", ("/nowhere", "$HOME"))
    host.environment.pop("HOME")
    assert host.run()[0] == 126
    assert list(Path("/").glob("llamafleet-probe.*")) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a noexec file system needs root")
def test_noexec_place_is_passed_over(host, tmp_path, monkeypatch):
    noexec = tmp_path / "noexec"
    noexec.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", str(noexec)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this machine does not mount: {mounted.stderr.decode()}")
    try:
        monkeypatch.setattr(payload, "UNPACK_PLACES", (str(noexec),))
        assert host.run()[0] == 126
        monkeypatch.setattr(payload, "UNPACK_PLACES", (str(noexec), str(host.places)))
        assert host.run()[0] == 0
        assert list(noexec.iterdir()) == []
        assert host.traces() == []
    finally:
        subprocess.run(["umount", str(noexec)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_ended_in_the_middle_it_still_leaves_nothing(host, tmp_path, number):
    """NVML hangs, and the connection is lost: neither files nor processes stay."""
    library = build(tmp_path / "nvml")
    state = tmp_path / "state"
    state.write_text("hang=init\n")
    process = host.start(LD_LIBRARY_PATH=str(library.parent), FAKE_NVML_STATE=str(state))
    process.stdin.write(host.line)
    process.stdin.close()
    process.stdin = None  # for `communicate`
    readers = wait_for(lambda: processes_with(f"{host.places}/", "probe_gpus.py"))
    assert oct(next(host.places.iterdir()).stat().st_mode & 0o777) == "0o700"
    wait_for(lambda: loaded(readers[0], library))
    os.kill(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert host.traces() == []
    assert wait_for(lambda: not processes_with(f"{host.places}/"))


def heed_signals():
    """As sshd starts a command. Under nohup or in a shell's background these are ignored, for good."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def wait_for(condition, seconds=15):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return value


def loaded(pid, library):
    with contextlib.suppress(OSError):
        return str(library) in Path(f"/proc/{pid}/maps").read_text()
    return False


def processes_with(*texts):
    """Pids of running processes with all the texts in their command line, except ended ones."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
            if all(text in line for text in texts) and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found
