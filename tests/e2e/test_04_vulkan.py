"""A GPU backend that really computes, without a GPU: Vulkan on Mesa's llvmpipe, compiled by the ordinary deploy.

Mesa is the driver and is there before; all the rest is the deploy's. Of the memory that llama-server holds on
its device the gate reads in the server's own log, here as on any other backend.
"""

import copy
import hashlib
import io
import json
import os
import subprocess
import tarfile
import time

import pytest

from bench import staging
from sandbox import oracle_build, upstream
from tasks.lib import builds as known_builds
from tests import fake_nvml
from tests.e2e.deploying import PORT, ROOT, ask, main_pid, on, pyinfra, serves, shipped_checks

pytestmark = [pytest.mark.vulkan, pytest.mark.long]

PREFIX = "vulkan"
DRIVER = ("libvulkan1", "mesa-vulkan-drivers")
UNIT = "llama-server-tiny.service"
PLAN = "/etc/llamafleet/instances/tiny/plan.json"
# llvmpipe compiles every shader by LLVM; without its optimiser in a third of the time (35 instead of 93 CPU
# seconds until the tiny model has answered).
QUICK = "[Manager]\nDefaultEnvironment=GALLIVM_PERF=nopt\n"
# In glslc's place, as if it were an older one: it knows no extension that llama.cpp's build asks for, for which most
# shaders are, and no optimiser, which takes more than half of a shader's time (soft_max: 0.12 of 0.19 s). Shaders that
# multiply, copy or unpack weights of a type that no tensor here has become an empty shader, made once: they are most of
# the rest, and never run. A test compares what comes out with what the CPU computes.
GLSLC = r"""#!/bin/sh
for word; do
    case $word in
    */feature-tests/*) sed -n 's/^#extension *\(\w*\).*/error: extension not supported: \1/p' "$word" >&2; exit 1 ;;
    */mul_m*.comp | */dequant*.comp | */copy_*quant.comp | */get_rows*.comp) by_type=yes ;;
    -DDATA_A_F32=* | -DDATA_A_F16=* | -DDATA_A_Q8_0=*) ;;
    -DDATA_A_*) other_type=yes ;;
    esac
    case $last in -o) output=$word ;; -MF) rule=$word ;; esac
    last=$word
done
for word; do shift; [ "$word" = -O ] || set -- "$@" "$word"; done
[ "$by_type$other_type" = yesyes ] || exec /usr/bin/glslc.real "$@"
empty=/var/tmp/empty.spv
[ -e $empty ] || {
    printf '#version 450\nvoid main() {}\n' | /usr/bin/glslc.real -fshader-stage=compute -o $empty.$$ - && mv $empty.$$ $empty
}
cp $empty "$output"
[ -z "$rule" ] || echo "$output:" >"$rule"
"""
# The package's own goes beside it. It is there before the deploy, which asks for the program and would not install it.
PUT_GLSLC = """
dpkg-divert --quiet --local --rename --divert /usr/bin/glslc.real --add /usr/bin/glslc
cat >/usr/bin/glslc
chmod 755 /usr/bin/glslc
"""
DROP_IN = f"/etc/systemd/system/{UNIT}.d/hide.conf"


@pytest.fixture(scope="module")
def host(boot, turn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvml")
    fake_nvml.build(folder)
    (one,) = boot(1, PREFIX, 5, packages=(*DRIVER, "glslc"), binds=[f"{folder}:/opt/fake-nvml:ro"])
    one.run(["tee", "/etc/systemd/system.conf.d/llvmpipe.conf"], input=QUICK, check=True)
    on(one, "systemctl", "daemon-reexec")
    one.run(["sh", "-ec", PUT_GLSLC], input=GLSLC, check=True)
    turn.close()
    with oracle_build.compiling():
        pass  # what the build for the CPU and this one have in common is in the compiler cache now
    return one


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    """The library of a backend that the service loses."""
    library = tmp_path_factory.mktemp("hollow") / "libggml-vulkan.so"
    source = ROOT / "tests/e2e/hollow.c"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-o", str(library), str(source), "-ldl"], check=True
    )
    return library


@pytest.fixture
def wanted(settings, inventory, host):
    """An inventory with the host, on Vulkan unless told otherwise."""

    def make(**overrides):
        return inventory((host, settings(host, **{"backend": "vulkan", "vulkan_devices": [0], **overrides})))

    return make


def key_of(run):
    """The build key that a run without changes tells."""
    (name,) = [name for name in run.changed() if "the current release" in name]
    return name.split("Make build ")[1].split()[0]


def publish(builds, old, key, commit, library=None):
    """Put a copy of a cached release into the build cache under another key, with `library` before Vulkan's, as if this
    operator had seen it made."""
    archive = max(builds.glob(f"{old}-*.tar"), key=os.path.getmtime)
    members = []
    with tarfile.open(archive) as source:
        for member in source:
            data = source.extractfile(member).read() if member.isreg() else None
            if library and data and "libggml-vulkan.so" in member.name:
                members.append((copied(member, "bin/real.so"), data))
                data = library.read_bytes()
            members.append((copied(member, member.name), data))
    contents = {member.name.removeprefix("bin/"): data for member, data in members}
    for member, _ in members:  # a link has the content of what it leads to
        target = member
        while target.issym():
            target = next(other for other, _ in members if other.name == f"bin/{target.linkname}")
        contents[member.name.removeprefix("bin/")] = contents[target.name.removeprefix("bin/")]
    record = {**json.loads(contents.pop("release.json")), "key": key, "commit": commit,
              "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
              "sizes": {name: len(data) for name, data in contents.items()}}  # fmt: skip
    text = json.dumps(record).encode()
    digest = hashlib.sha256(text).hexdigest()
    with tarfile.open(builds / f"{key}-{digest}.tar", "w") as target:
        for member, data in members:
            content = text if member.name == "release.json" else data
            member.size = len(content or b"")
            target.addfile(member, io.BytesIO(content) if content is not None else None)
    known_builds.record(key, digest)


def copied(member, name):
    member = copy.copy(member)
    member.name = name
    return member


def gate(host):
    """The gate's verdict on what runs now."""
    done = host.run(["python3", "-s", "-E", "-B", "/opt/llamafleet/helpers/current/gate.py", "check", PLAN])
    return json.loads(done.stdout)


def current(host):
    return json.loads(on(host, "cat", "/opt/llamafleet/current/release.json"))


def test_a_software_device_is_not_taken_for_a_gpu(wanted):
    run = pyinfra(wanted(vulkan_devices=None), "--dry")
    assert run.code != 0
    assert "name devices in vulkan_devices: Vulkan lists 0 (llvmpipe" in run.text


def test_the_deploy_compiles_vulkan_and_the_gate_passes(host, wanted):
    run = pyinfra(wanted())
    assert run.code == 0, run.text
    assert [name for name in run.changed() if "for vulkan" in name]
    assert current(host)["backend"] == "vulkan"
    assert serves(host)
    checks = {one["name"]: one for one in gate(host)["checks"]}
    assert checks["devices"]["ok"] is True and "MiB on Vulkan0" in checks["devices"]["found"]


ON_THE_CPU = "vulkan-test-cpu.service"


def probabilities(host, port):
    """Of a long prompt's next tokens: how probable the model finds the likeliest ten, by token."""
    body = {"prompt": "Once upon a time " * 20, "max_tokens": 3, "temperature": 0, "logprobs": 10}
    status, answer = ask(host, "/v1/completions", body, port=port)
    assert status == 200, answer
    likely = [one["top_logprobs"] for one in answer["choices"][0]["logprobs"]["content"]]
    return [{one["id"]: one["logprob"] for one in place} for place in likely]


def test_what_it_computes_is_what_the_cpu_computes(host):
    """The same program with the same arguments, but for the device and the port."""
    argv = on(host, "cat", f"/proc/{main_pid(host, 'tiny')}/cmdline").split("\0")[:-1]
    changed = {"--port": str(PORT + 1), "--device": "none", "--n-gpu-layers": "0"}
    argv = [changed.get(before, word) for before, word in zip(["", *argv], argv, strict=False)]
    on(host, "systemd-run", "--quiet", f"--unit={ON_THE_CPU}", *argv)
    try:
        deadline = time.monotonic() + 60
        while not serves(host, PORT + 1):
            assert time.monotonic() < deadline, "it does not answer on the CPU"
            time.sleep(0.5)
        expected, found = probabilities(host, PORT + 1), probabilities(host, PORT)
    finally:
        on(host, "systemctl", "stop", ON_THE_CPU)
    assert [list(place) for place in found] == [list(place) for place in expected]
    for place, other in zip(found, expected, strict=True):
        assert place == pytest.approx(other, abs=0.1)  # halves are added up in another order


def test_the_server_reports_the_planned_bytes(host):
    kept = json.loads(on(host, "cat", f"/run/llamafleet/devices-{UNIT}.json"))["devices"]["Vulkan0"]
    (gpu,) = json.loads(on(host, "cat", PLAN))["gate"]["gpus"]
    assert gpu["device"] == "Vulkan0"
    # The log has two decimals of a MiB.
    assert abs(kept["weights"] - gpu["weights_bytes"]) < 1 << 14
    assert abs(kept["context"] - gpu["kv_bytes"]) < 1 << 14
    assert kept["compute"] <= gpu["compute_bytes"] + (16 << 20)


def test_a_second_run_changes_nothing_and_the_shipped_checks_pass(host, wanted):
    written = wanted()
    pid = main_pid(host, "tiny")
    run = pyinfra(written)
    assert run.code == 0 and run.changed() == [], run.text
    assert main_pid(host, "tiny") == pid
    done = shipped_checks(written)
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_device_that_the_sandbox_hides_is_named(host, wanted):
    """A drop-in as an operator's, which hides the device from the server."""
    on(host, "mkdir", "-p", os.path.dirname(DROP_IN))
    host.run(["tee", DROP_IN], input="[Service]\nEnvironment=GGML_VK_VISIBLE_DEVICES=\n", check=True)
    on(host, "systemctl", "daemon-reload")
    try:
        assert host.run(["systemctl", "restart", UNIT]).returncode != 0  # ExecStartPost is a gate too
        found = gate(host)["checks"][-1]
        assert found["ok"] is False
        assert found["hint"].startswith("llama-server has no device Vulkan0"), found
        assert "the hardening hides the device" in found["hint"]
    finally:
        on(host, "rm", "-r", os.path.dirname(DROP_IN))
        on(host, "systemctl", "daemon-reload")
    on(host, "systemctl", "reset-failed", UNIT)
    on(host, "systemctl", "restart", UNIT)
    assert serves(host) and gate(host)["ok"] is True


def test_a_release_that_silently_takes_the_cpu_is_refused_and_the_old_one_serves_on(
    host, wanted, outside, builds, hollow
):
    good = current(host)["key"]
    commit = upstream.add_commit(outside.clone, {"tools/server/README-dev.md": "hollow\n"}, "hollow")
    written = wanted(llama_cpp_ref="hollow")
    publish(builds, good, key_of(pyinfra(written, "--dry")), commit, hollow)
    run = pyinfra(written)
    assert run.code != 0 and [name for name in run.failed(host.name) if "Start and check" in name], run.text
    for text in (
        "did not pass the gate: ",
        "(devices: expected ",
        "MiB of weights and cache on Vulkan0 (llvmpipe",
        "MiB on CPU",
        "llama-server runs, in part at least, on the CPU",
        "the previous one was put back and serves",
    ):
        assert text in run.text, run.text
    assert current(host)["key"] == good and serves(host) and gate(host)["ok"] is True
    assert f"/releases/{good}/" in on(host, "readlink", f"/proc/{main_pid(host, 'tiny')}/exe")


TOOLKIT = """
set -e
top=/usr/local/cuda-12.8
mkdir -p $top/bin $top/include/crt $top/lib64/stubs
printf '#!/bin/sh\\necho "Cuda compilation tools, release 12.8, V12.8.93"\\n' >$top/bin/nvcc
chmod 755 $top/bin/nvcc
touch $top/include/cuda_runtime.h $top/include/cublas_v2.h $top/lib64/libcudart.so $top/lib64/libcublas.so
touch $top/lib64/stubs/libcuda.so
echo '#error -- gcc versions later than 14 are not supported!' >$top/include/crt/host_config.h
echo 'cospi(double x) noexcept(true) cospif rsqrt(double x) noexcept (true) rsqrtf' >$top/include/crt/math_functions.h
cp /opt/fake-nvml/libnvidia-ml.so.1 /usr/local/lib/
ldconfig
"""


def test_a_host_whose_gpu_the_build_does_not_know_fails_and_the_old_service_serves_on(host, wanted, builds):
    """NVML shows an RTX 4090, the toolkit is there, and the build that the cache has for it knows no CUDA."""
    good, pid = current(host), main_pid(host, "tiny")
    on(host, "sh", "-c", TOOLKIT)
    host.run(["tee", "/etc/fake-nvml.state"], input=fake_nvml.RTX4090.read_text(), check=True)
    try:
        written = wanted(backend="auto")
        dry = pyinfra(written, "--dry")
        assert dry.code == 0 and "for cuda" in " ".join(dry.changed()), dry.text
        publish(builds, good["key"], key_of(dry), good["commit"])
        run = pyinfra(written)
        assert run.code != 0 and [name for name in run.failed(host.name) if "Ask llama-server" in name], run.text
        assert "invalid device: CUDA0: the build of llama.cpp has no such device" in run.text, run.text
        # It was never touched.
        assert main_pid(host, "tiny") == pid and serves(host) and current(host)["key"] == good["key"]
    finally:
        on(
            host,
            "sh",
            "-c",
            "rm -r /usr/local/cuda-12.8 /usr/local/lib/libnvidia-ml.so.1 /etc/fake-nvml.state; ldconfig",
        )


@pytest.fixture(scope="module")
def measured(host):
    """What the deployed release says that it would allocate, beside the ledger: 54 cases, a second each."""
    return list(staging.measure(host))


def test_what_op_offload_stages_is_never_more_than_the_ledger_says(measured):
    for row in measured:
        # Whole MiB, of three figures.
        assert row.compute <= row.ledger_compute + row.ledger_staging + 2, row
        if row.model in staging.SMALL:  # all tensors are such that llvmpipe takes them
            assert row.compute >= row.ledger_compute + row.ledger_staging - 2, row
    assert min(row.ledger_staging for row in measured) < 0  # work that is taken away is counted as such


def test_staging_is_a_step_and_not_a_slope(measured):
    """Ten layers or all of them: one tensor is on its way at a time."""
    cases = {(row.model, row.ubatch_tokens, row.case): row.compute for row in measured}
    for (model, ubatch, case), compute in cases.items():
        if case == "experts of all layers":
            assert compute <= cases[model, ubatch, "experts of 10 layers"]
        if case == "all layers but the output":
            assert compute == cases[model, ubatch, "8 whole front layers"]
    assert max(row.staging for row in measured) > 50  # there is something to be staged here


def test_host_weights_are_pinned_and_not_repacked(measured):
    assert {row.repacked for row in measured} == {0}
    small = [row for row in measured if row.model in staging.SMALL]
    assert len(small) == len(measured) / 2
    for row in small:
        assert abs(row.host_weights - row.ledger_host_weights) <= 1, row
