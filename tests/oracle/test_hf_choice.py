"""Of a repository llama-server itself takes the file that we take.

The built llama-server is asked with -hf, against a stand-in for the Hub: the file that it asks for first is the one.
"""

import os
import subprocess
import time

import pytest

from llamafleet.hub.choice import best_file, best_projector
from sandbox import models, oracle
from sandbox.hub import Hub

pytestmark = pytest.mark.oracle

REPOSITORIES = {
    "acme/many-GGUF": ["m-BF16.gguf", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-Q4_K_M.gguf"],
    "acme/none-of-the-usual-GGUF": ["m-IQ2_XS.gguf", "m-IQ3_M.gguf", "mtp-m-Q4_K_M.gguf"],
    "acme/split-GGUF": ["Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", "Q4_K_M/m-Q4_K_M-00002-of-00002.gguf", "m-Q8_0.gguf"],
    "acme/folders-GGUF": ["Q4_K_M-imat/m-IQ1_S.gguf", "m.Q4_K_M.gguf", "imatrix-m-Q4_K_M.gguf"],
    "acme/sees-GGUF": ["m-BF16.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-BF16.gguf", "mmproj-F32.gguf",
                       "mmproj-Q8_0.gguf"],
    "acme/sees-in-folders-GGUF": ["BF16/m-BF16.gguf", "BF16/mmproj-m-F32.gguf", "Q8/m-Q8_0-00001-of-00001.gguf",
                                  "mmproj-m-F16.gguf", "mmproj-m.gguf", "other/mmproj-m-Q8_0.gguf"],
}  # fmt: skip
ASKED = [("acme/many-GGUF", ""), ("acme/many-GGUF", "bf16"), ("acme/many-GGUF", "Q8_0"), ("acme/many-GGUF", "Q4_K"),
         ("acme/none-of-the-usual-GGUF", ""), ("acme/split-GGUF", ""), ("acme/split-GGUF", "Q8_0"),
         ("acme/folders-GGUF", "")]  # fmt: skip
SEES = [("acme/sees-GGUF", ""), ("acme/sees-GGUF", "bf16"), ("acme/sees-GGUF", "Q8_0"),
        ("acme/sees-in-folders-GGUF", "BF16"), ("acme/sees-in-folders-GGUF", "Q8_0"), ("acme/many-GGUF", "Q8_0"),
        ("acme/folders-GGUF", "")]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of the files of all repositories, and the model's."""
    folder = tmp_path_factory.mktemp("models")
    file = models.tiny(folder)
    # Each with its own contents: of equal files llama-server fetches one.
    for name in {name for names in REPOSITORIES.values() for name in names if "mmproj" in name}:
        (folder / name.replace("/", "_")).write_text(name)
    return folder, file


@pytest.fixture
def hub(files):
    """One for each test: what a server that was ended has asked for may be noted late."""
    folder, file = files
    with Hub() as hub:
        for repo, names in REPOSITORIES.items():
            for name in names:
                hub.add(repo, name, folder / name.replace("/", "_") if "mmproj" in name else file)
        yield hub


@pytest.mark.parametrize(("repo", "quant"), ASKED, ids=lambda text: text or "default")
def test_llama_server_takes_the_same_file(hub, repo, quant, tmp_path):
    wanted = best_file(REPOSITORIES[repo], quant)
    taken = _taken(hub, repo, quant, tmp_path, 1, "--no-mmproj")
    assert (taken[:1] or [None]) == [wanted], _end_of_log(tmp_path)


@pytest.mark.parametrize(("repo", "quant"), SEES, ids=lambda text: text or "default")
def test_llama_server_takes_the_same_projector(hub, repo, quant, tmp_path):
    names = REPOSITORIES[repo]
    model = best_file(names, quant)
    projector = best_projector(names, model)
    wanted = sorted([model, projector] if projector else [model])
    assert _taken(hub, repo, quant, tmp_path, len(wanted)) == wanted, _end_of_log(tmp_path)


def _taken(hub, repo, quant, folder, count, *flags):
    """The repository's files, `count` or more, that llama-server asks for."""
    place = f"{repo}:{quant}" if quant else repo
    command = [oracle.build().llama_server, "-hf", place, *flags, "--host", "127.0.0.1",
               "--port", str(oracle.free_port()), "--no-warmup", "--fit", "off", "--ctx-size", "256", "--no-ui"]  # fmt: skip
    environment = {**os.environ, "MODEL_ENDPOINT": f"{hub.url}/", "HF_HOME": str(folder), "LLAMA_CACHE": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while process.poll() is None and len(_asked(hub, repo)) < count and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    return _asked(hub, repo)


def _end_of_log(folder):
    return (folder / "log").read_text(errors="replace")[-1000:]


def _asked(hub, repo):
    """The models' files that were asked for; of a split model its shards are asked for at once."""
    mark = f"/{repo}/resolve/"
    names = [one.path.split(mark)[1].partition("/")[2] for one in list(hub.requests) if mark in one.path]
    return sorted(dict.fromkeys(names))
