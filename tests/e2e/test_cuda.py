"""A host with an RTX 4090 as far as NVML tells, and none in truth: CUDA is compiled by the ordinary
stages, and the service is refused, because the planned GPU does not hold the model.

Eight gigabytes of disk and ten to twenty minutes: `make test-cuda`.
"""

import json

import pytest

from sandbox import hosts as sandbox
from sandbox.outside import BUILDS
from tests import fake_nvml
from tests.e2e.conftest import ON_HOST
from tests.e2e.deploying import on, pyinfra

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def gpu_host(tmp_path_factory):
    sandbox.prepare()
    sandbox.down()
    folder = tmp_path_factory.mktemp("nvml")
    library = fake_nvml.build(folder)
    BUILDS.mkdir(parents=True, exist_ok=True)
    try:
        (host,) = sandbox.up(1, binds=[f"{folder}:/opt/fake-nvml:ro", f"{BUILDS}:{ON_HOST}"])
        on(host, "cp", f"/opt/fake-nvml/{library.name}", "/usr/local/lib/libnvidia-ml.so.1")
        host.run(["tee", "/etc/fake-nvml.state"], input=fake_nvml.RTX4090.read_text(), check=True)
        on(host, "ldconfig")
        yield host
    finally:
        sandbox.down()


@pytest.fixture(scope="module")
def run(gpu_host, outside, tmp_path_factory):
    from tests.e2e.deploying import write_inventory

    model = {"name": "tiny", "source": outside.sources["dense"], "port": 8080, "listen": gpu_host.address,
             "context_tokens": 1024}  # fmt: skip
    data = {**outside.settings(), "build_cache": ON_HOST, "cuda_toolkit": "distro", "models": [model]}
    written = write_inventory(tmp_path_factory.mktemp("cuda") / "inventory.py", [(gpu_host, data)])
    return pyinfra(written, timeout=3000)


def test_cuda_is_compiled_by_the_ordinary_stages(gpu_host, run):
    built = [name for name in run.changed(gpu_host.name) if "Build llama.cpp" in name]
    assert built, run.text
    (folder,) = on(gpu_host, "sh", "-c", "ls -d /opt/llamafleet/releases/*").split()
    record = json.loads(on(gpu_host, "cat", f"{folder}/release.json"))
    assert record["backend"] == "cuda" and record["architectures"] == ["89"]
    assert any(name.startswith("libggml-cuda.so") for name in record["files"])
    listed = gpu_host.run([f"{folder}/bin/llama-server", "--list-devices"])
    assert listed.returncode == 0 and "Available devices" in listed.stdout + listed.stderr


def test_the_host_is_not_called_good_because_the_gpu_is_not_there(gpu_host, run):
    assert run.code != 0
    assert [name for name in run.failed(gpu_host.name) if "Start and check" in name]
    # Tried before the switch: a planned device that llama-server does not list is none.
    for text in ("llama-server does not work on this host, even without hardening", "shows no CUDA0"):
        assert text in run.text, run.text
    state = on(gpu_host, "sh", "-c", "systemctl is-active llama-server-tiny.service; true")
    assert state in ("inactive", "failed")
