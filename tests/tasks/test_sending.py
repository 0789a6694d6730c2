"""Which program runs on a host: the installed one if it is whole, else a copy; as the host's own shell decides it."""

import hashlib
import subprocess

import pytest

from tasks.lib import sending

PROGRAM = "import sys; print(sys.argv[1:])\n"


@pytest.fixture
def folder(tmp_path):
    """Helpers of this version with their sums."""
    folder = tmp_path / "helpers of a version"
    folder.mkdir()
    files = {"survey.py": PROGRAM, "common.py": "x = 1\n"}
    for name, text in files.items():
        (folder / name).write_text(text)
    sums = "".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in files.items())
    (folder / "helpers.sha256").write_text(sums)
    return folder


def run(folder, *arguments):
    words = ["sh", "-c", sending._INSTALLED, sending._NO_HELPERS, "python3", str(folder), "survey.py", *arguments]
    return subprocess.run(words, capture_output=True, text=True)


def test_whole_helpers_are_run_with_their_words(folder):
    done = run(folder, "a b", "$(x)", "")
    assert (done.returncode, done.stdout) == (0, "['a b', '$(x)', '']\n")


@pytest.mark.parametrize("name", ["survey.py", "common.py", "helpers.sha256"])
@pytest.mark.parametrize("harm", ["empty", "changed", "gone"])
def test_damaged_helpers_are_not_run(folder, name, harm):
    """A power cut can empty files; all of them lie beside the sums, and no sum is no damage: llamafleet 0.1.0 has none."""
    path = folder / name
    path.unlink() if harm == "gone" else path.write_text("" if harm == "empty" else "x = 2\n")
    done = run(folder)
    if (name, harm) == ("helpers.sha256", "gone"):
        assert done.stdout == "[]\n"
    else:
        assert (done.returncode, done.stdout) == (0, sending._NO_HELPERS + "\n")


def test_a_host_without_helpers_has_none(tmp_path):
    assert run(tmp_path / "nowhere").stdout == sending._NO_HELPERS + "\n"
