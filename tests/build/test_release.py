"""The build key: same key, same artefact."""

import dataclasses

import pytest

from llamafleet.build.release import Build, jobs
from sandbox import oracle_build

BUILD = Build(
    commit="c" * 40, backend="cuda", toolkit="cuda-12.8", architectures=("89",), machine_arch="x86_64",
    libc="2.41", cpu_flags=("avx2", "fma"), kv_types=("f16",), ui=False, tls=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("commit", "d" * 40),
        ("backend", "cpu"),
        ("toolkit", "cuda-13.0"),
        ("architectures", ("86", "89")),
        ("machine_arch", "aarch64"),
        ("libc", "2.36"),
        ("cpu_flags", ("avx2", "avx512f", "fma")),
        ("kv_types", ("f16", "q5_1")),
        ("ui", True),
        ("tls", True),
    ],
)
def test_whatever_changes_the_artefact_changes_the_key(field, value):
    assert dataclasses.replace(BUILD, **{field: value}).key != BUILD.key


def test_the_place_of_the_compiler_does_not_change_the_key():
    # The toolkit is installed by the run that builds: before, its path is not known.
    assert dataclasses.replace(BUILD, nvcc="/usr/local/cuda-12.8/bin/nvcc").key == BUILD.key


def test_kv_types_with_kernels_of_their_own_do_not_change_the_key():
    # ggml-cuda compiles these pairs anyway: no rebuild for a change of the inventory.
    assert dataclasses.replace(BUILD, kv_types=("q8_0", "f16")).key == BUILD.key


def test_planned_kv_types_get_flash_attention_kernels():
    flags = dataclasses.replace(BUILD, kv_types=("q5_1",)).cmake_flags()
    pairs = next(flag for flag in flags if "GGML_CUDA_FA_QUANTS" in flag).split("=")[1].split(";")
    assert "q5_1-q5_1" in pairs and "f16-f16" in pairs


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_types_of_k_and_v_apart_get_a_kernel_for_their_pair(backend):
    build = dataclasses.replace(BUILD, backend=backend, kv_types=("q8_0/f16", "f32/q5_1", "f16/iq4_nl", "bf16"))
    pairs = next(flag for flag in build.cmake_flags() if "GGML_CUDA_FA_QUANTS" in flag).split("=")[1].split(";")
    assert {"q8_0-f16", "f16-q5_1"} <= set(pairs)  # an f32 cache is converted before; of iq4_nl there is no kernel
    assert not any("f32" in pair or "iq4_nl" in pair for pair in pairs)
    assert {"f16-f16", "bf16-bf16", "q8_0-q8_0", "q4_0-q4_0"} <= set(pairs)


def test_cuda_is_never_compiled_for_native():
    assert "-DCMAKE_CUDA_ARCHITECTURES=89" in BUILD.cmake_flags()


@pytest.mark.parametrize(
    ("backend", "cores", "gib", "asked", "expected"),
    [
        ("cuda", 16, 64, None, 16),
        ("cuda", 16, 20, None, 5),
        ("cuda", 16, 2, None, 1),
        ("cpu", 4, 3, None, 3),
        ("cpu", 4, 64, 7, 7),
    ],
)
def test_jobs_by_cores_and_memory(backend, cores, gib, asked, expected):
    assert jobs(backend, cores, gib << 30, asked) == expected


def test_commits_of_one_configuration_share_a_build_folder():
    other = dataclasses.replace(BUILD, commit="d" * 40)
    assert other.tree == BUILD.tree and other.key != BUILD.key
    assert dataclasses.replace(BUILD, libc="2.36").tree != BUILD.tree


def test_the_oracle_is_compiled_as_a_deploy_compiles():
    """With the same options it takes the object files of the tests' hosts."""
    deployed = dataclasses.replace(BUILD, backend="cpu", toolkit=None, architectures=())
    assert set(oracle_build.FLAGS) == {*deployed.cmake_flags(), "-DGGML_RPC=ON"}
