"""What the host program finds, in small trees of toolkits, and on this machine where it has one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "llamafleet" / "remote" / "toolkits.py"
COSPI = "extern __device_builtin__ double  cospi(double x);\n"
RSQRT = "extern __device_builtin__ double  rsqrt(double x);\n"
MENDED = "extern double cospi(double x) SPECIFIER;\nextern double rsqrt(double x) noexcept (true);\n"


@pytest.fixture
def toolkits(monkeypatch):
    """The program as a module, loaded by its path as its sibling programs do."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import toolkits

    monkeypatch.setattr(toolkits, "gcc_version", lambda name: "14.2.0")
    monkeypatch.setattr(toolkits, "libc", lambda: (2, 41))
    monkeypatch.setattr(toolkits.shutil, "which", lambda name: None)
    return toolkits


def put(path, text="", mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def compiler(path, version):
    put(path, f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.93'\n", 0o755)


def nvidias(root, home, version="12.8", *, gcc=14, declared=MENDED):
    """A whole toolkit as NVIDIA's packages lay it out, targets folder and links included."""
    top = root / home.lstrip("/")
    target = top / "targets/x86_64-linux"
    compiler(top / "bin/nvcc", version)
    for name in ("cuda_runtime.h", "cublas_v2.h"):
        put(target / "include" / name)
    put(target / "include/crt/host_config.h", f"#error -- gcc versions later than {gcc} are not supported!\n")
    put(target / "include/crt/math_functions.h", declared)
    for name in ("libcudart.so", "libcublas.so", "stubs/libcuda.so"):
        put(target / "lib" / name)
    (top / "include").symlink_to("targets/x86_64-linux/include")
    (top / "lib64").symlink_to("targets/x86_64-linux/lib")
    return top


def debians(root):
    """As Debian 13's nvidia-cuda-toolkit and nvidia-cuda-dev lay it out."""
    hidden = "/usr/lib/nvidia-cuda-toolkit/bin/nvcc"
    compiler(root / hidden.lstrip("/"), "12.4")
    put(root / "usr/bin/nvcc", f'#!/bin/sh\nexec {hidden} "$@"\n', 0o755)
    for name in ("cuda_runtime.h", "cublas_v2.h"):
        put(root / "usr/include" / name)
    # gcc 14 is the default there; the package brings its own choice and a header that mends cospi().
    put(root / "usr/include/crt/host_config.h", "#error -- gcc versions later than 13 are not supported!\n")
    put(root / "usr/include/crt/math_functions.h", COSPI + RSQRT)
    for name in ("libcudart.so", "libcublas.so", "stubs/libcuda.so"):
        put(root / "usr/lib/x86_64-linux-gnu" / name)


def test_nothing(toolkits, tmp_path):
    assert toolkits.find(str(tmp_path)) == []


def test_whole_toolkit_and_the_links_to_it(toolkits, tmp_path):
    nvidias(tmp_path, "/usr/local/cuda-12.8")
    (tmp_path / "usr/local/cuda").symlink_to("cuda-12.8")
    (tmp_path / "usr/local/cuda-12").symlink_to("cuda-12.8")
    assert toolkits.find(str(tmp_path)) == [{
        "path": "/usr/local/cuda-12.8", "nvcc": "/usr/local/cuda-12.8/bin/nvcc", "version": "12.8",
        "aliases": ["/usr/local/cuda", "/usr/local/cuda-12"], "distro": False, "headers": True, "cublas": True,
        "cudart": True, "driver_stub": True, "host_compiler": "14.2.0", "accepted_compiler": None, "problems": [],
        "gcc_limit": 14, "build": "12.8.93",
    }]  # fmt: skip


def test_several_places_and_one_that_is_named(toolkits, tmp_path):
    nvidias(tmp_path, "/usr/local/cuda-12.8")
    nvidias(tmp_path, "/opt/cuda", "13.0")
    nvidias(tmp_path, "/srv/tools/cuda", "12.6")
    found = toolkits.find(str(tmp_path), extra=["/srv/tools/cuda/"])
    assert {one["path"]: one["version"] for one in found} == {
        "/opt/cuda": "13.0", "/srv/tools/cuda": "12.6", "/usr/local/cuda-12.8": "12.8",
    }  # fmt: skip
    assert len(toolkits.find(str(tmp_path))) == 2


@pytest.mark.parametrize(("removed", "part"), [
    ("include/cuda_runtime.h", "headers"), ("include/crt/host_config.h", "headers"),
    ("include/cublas_v2.h", "cublas"), ("lib/libcublas.so", "cublas"),
    ("lib/libcudart.so", "cudart"), ("lib/stubs/libcuda.so", "driver_stub"),
])  # fmt: skip
def test_a_part_that_is_missing(toolkits, tmp_path, removed, part):
    top = nvidias(tmp_path, "/usr/local/cuda-12.8")
    (top / "targets/x86_64-linux" / removed).unlink()
    (one,) = toolkits.find(str(tmp_path))
    parts = ("headers", "cublas", "cudart", "driver_stub")
    assert {name for name in parts if not one[name]} == {part}


def test_the_drivers_own_libcuda_serves_to_link(toolkits, tmp_path):
    top = nvidias(tmp_path, "/usr/local/cuda-12.8")
    (top / "lib64/stubs/libcuda.so").unlink()
    put(tmp_path / "usr/lib/x86_64-linux-gnu/libcuda.so")
    assert toolkits.find(str(tmp_path))[0]["driver_stub"]


def test_debians_own_once_under_its_wrapper(toolkits, tmp_path):
    debians(tmp_path)
    (one,) = toolkits.find(str(tmp_path))
    assert (one["path"], one["nvcc"], one["version"]) == ("/usr", "/usr/bin/nvcc", "12.4")
    assert one["distro"] and one["headers"] and one["cublas"] and one["cudart"] and one["driver_stub"]
    assert one["problems"] == [] and one["host_compiler"] is None


def test_a_wrapper_leads_to_its_toolkit(toolkits, tmp_path):
    nvidias(tmp_path, "/usr/local/cuda-13.0", "13.0")
    put(tmp_path / "usr/bin/nvcc", '#!/bin/sh\nexec /usr/local/cuda-13.0/bin/nvcc "$@"\n', 0o755)
    assert [one["path"] for one in toolkits.find(str(tmp_path))] == ["/usr/local/cuda-13.0"]


def test_a_compiler_cache_in_its_place_is_no_toolkit(toolkits, tmp_path):
    put(tmp_path / "usr/bin/ccache", "", 0o755)
    (tmp_path / "usr/bin/nvcc").symlink_to("ccache")
    assert toolkits.find(str(tmp_path)) == []


def test_a_compiler_that_does_not_run_has_no_version(toolkits, tmp_path):
    put(nvidias(tmp_path, "/usr/local/cuda-12.8") / "bin/nvcc", "#!/bin/sh\nexit 1\n", 0o755)
    assert toolkits.find(str(tmp_path))[0]["version"] is None


def test_default_gcc_too_new(toolkits, tmp_path):
    nvidias(tmp_path, "/usr/local/cuda-12.4", "12.4", gcc=13)
    (one,) = toolkits.find(str(tmp_path))
    assert one["problems"] == ["it accepts gcc up to 13, the host has 14.2.0: install g++-13"]


def test_default_gcc_too_new_and_an_older_one_beside_it(toolkits, tmp_path, monkeypatch):
    nvidias(tmp_path, "/usr/local/cuda-12.4", "12.4", gcc=13)
    there = {"g++-12": "/usr/bin/g++-12", "g++-11": "/usr/bin/g++-11", "g++-14": "/usr/bin/g++-14"}
    monkeypatch.setattr(toolkits.shutil, "which", there.get)
    (one,) = toolkits.find(str(tmp_path))
    assert (one["accepted_compiler"], one["problems"]) == ("/usr/bin/g++-12", [])


@pytest.mark.parametrize(("glibc", "declared", "function"), [
    ((2, 40), COSPI + RSQRT, None), ((2, 41), COSPI + RSQRT, "cospi"), ((2, 41), RSQRT, None),
    ((2, 42), RSQRT, "rsqrt"), ((2, 43), MENDED, None), ((0,), COSPI, None),
])  # fmt: skip
def test_headers_against_the_hosts_glibc(toolkits, tmp_path, monkeypatch, glibc, declared, function):
    nvidias(tmp_path, "/usr/local/cuda-12.8", declared=declared)
    monkeypatch.setattr(toolkits, "libc", lambda: glibc)
    (one,) = toolkits.find(str(tmp_path))
    told = ".".join(map(str, glibc))
    assert one["problems"] == ([f"its headers clash with glibc {told} over {function}()"] if function else [])


def test_as_a_program_it_prints_json(tmp_path):
    nvidias(tmp_path, "/cuda-test", "12.6")
    done = subprocess.run(
        [sys.executable, "-s", "-E", "-B", PROGRAM, f"{tmp_path}/cuda-test"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {one["path"]: one["version"] for one in json.loads(done.stdout)}[f"{tmp_path}/cuda-test"] == "12.6"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="this machine has no nvcc to find")
def test_this_machines_own_compiler_is_found():
    """Against the compiler itself: its dry run tells which folder it takes for its own."""
    dry = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = next(line.split("=", 1)[1] for line in dry.splitlines() if line.startswith("#$ TOP="))
    done = subprocess.run([sys.executable, "-s", "-E", "-B", PROGRAM], capture_output=True, text=True, check=True)
    found = {one["path"]: one for one in json.loads(done.stdout)}
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert f"release {found[os.path.realpath(top)]['version']}," in told
