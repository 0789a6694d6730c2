"""Check out exactly one commit of llama.cpp.

Contract: `checkout.py FOLDER REPOSITORY COMMIT` makes FOLDER a git checkout of that commit (40 hexadecimal digits),
clean; it fetches that commit alone, and only where it is missing. REPOSITORY is an address, the path of a repository on
this host, or a pack file that the operator has sent, which is removed when the commit is there. git's lines on stdout;
the last one of a failure begins with `error: `. Exit 0 done, 1 failed. Killed at any point it can be run again. Root,
git, the standard library; git_pack.py beside it.
"""

from __future__ import annotations

import glob
import os
import subprocess
import sys
from typing import List

import git_pack

# A transfer slower than 1 kB/s for two minutes has stalled.
STALLED = ("-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=120")


def git(folder: str, *words: str, check: bool = True) -> bool:
    """Run git in the folder; its success. Raises CalledProcessError where it fails, unless `check` is False."""
    done = subprocess.run(["git", "-C", folder, *words], stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                          check=check, env={**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8"})  # fmt: skip
    return done.returncode == 0


def checkout(folder: str, repository: str, commit: str) -> None:
    """Raises CalledProcessError and OSError."""
    if not os.path.isdir(f"{folder}/.git"):
        os.makedirs(folder, exist_ok=True)
        git(folder, "init", "--quiet")
    # A shallow.lock or index.lock of a git that was killed would stop every later one.
    for left in glob.glob(f"{glob.escape(folder)}/.git/*.lock"):
        os.unlink(left)
    if not git(folder, "cat-file", "-e", commit + "^{commit}", check=False):
        fetch(folder, repository, commit)
    if repository.startswith("/") and os.path.isfile(repository):
        os.unlink(repository)
    git(folder, "checkout", "--quiet", "--force", "--detach", commit)
    git(folder, "clean", "--quiet", "-ffdx")


def fetch(folder: str, repository: str, commit: str) -> None:
    """Get the commit from the repository. Raises CalledProcessError, OSError and git_pack.Failed."""
    if not repository.startswith("/"):
        git(folder, *STALLED, "fetch", "--quiet", "--depth", "1", "--", repository, commit)
    elif os.path.isdir(repository):
        with git_pack.of_commit(repository, commit) as pack:
            git_pack.unpack(folder, pack, commit)
    else:
        with open(repository, "rb") as pack:
            git_pack.unpack(folder, pack, commit)


def main(argv: List[str]) -> int:
    folder, repository, commit = argv
    try:
        checkout(folder, repository, commit)
    except subprocess.CalledProcessError as error:
        if "fetch" in error.cmd:
            print(f"error: llama_cpp_ref: the repository does not give commit {commit} to this host", flush=True)
        else:
            print(f"error: git cannot check out commit {commit} in {folder}: git's own lines are above", flush=True)
        return 1
    except (OSError, git_pack.Failed) as error:
        print(f"error: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
