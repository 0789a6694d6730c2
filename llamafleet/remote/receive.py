"""Receive files from the operator, whole or not at all.

Contract: `receive.py [--fresh FOLDER] [--make FOLDER] [--too PATH]... PATH...`. Standard input has two lines: the
SHA-256 of the second one, and a JSON list with a pair [mode, content in base64] for each PATH, in their order. Nothing
is written unless the sum agrees. Each file is written beside its name, synced and renamed; its folder must be there.
The folder of `--fresh` is removed and made anew first, for root alone; that of `--make` is made where it is missing.
`--too` names a file that gets the content of the first PATH as well, where its folder is there. Prints nothing; what
fails is the last line on stderr, beginning with `error: `. Exit 0 done, 1 failed. Root, the standard library;
common.py beside it.

Files never pass through a name that another user could guess or replace: this program alone opens them, in folders of
root's. What came is compared here, so that a cut or damaged transfer changes nothing.

Decision 11: docs/decisions/0011-secrets-never-travel-in-the-open.md.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import sys
from typing import BinaryIO, List, Optional, Tuple

from common import make_folder, replace_file, sha256

Content = Tuple[int, bytes]  # a file's mode and bytes


class Failed(Exception):
    """The files cannot be received; the text is for the operator."""


def contents(stream: BinaryIO) -> List[Content]:
    """What was sent, compared with its sum."""
    wanted, _, text = stream.read().partition(b"\n")
    text = text.rstrip(b"\n")
    if sha256(text).encode() != wanted.strip():
        raise Failed("what arrived has another SHA-256 than what was sent: the transfer was cut or damaged, or "
                     "standard input does not reach the program (su with a password takes it)")  # fmt: skip
    return [(mode, base64.b64decode(data)) for mode, data in json.loads(text)]


def receive(
    paths: List[str], sent: List[Content], fresh: Optional[str], too: List[str], made: Optional[str] = None
) -> None:  # fmt: skip
    """Write each file. Raises OSError."""
    if made:
        make_folder(made)
    if fresh:
        shutil.rmtree(fresh, ignore_errors=True)
        os.makedirs(fresh, mode=0o700)
    for path, (mode, data) in zip(paths, sent):  # noqa: B905 -- `strict` is Python 3.10's; `main` has counted
        replace_file(path, data, mode)
    for path in too:
        if os.path.isdir(os.path.dirname(path)):
            replace_file(path, sent[0][1], sent[0][0])


def main(argv: List[str], stream: BinaryIO) -> int:
    parser = argparse.ArgumentParser(description="Receive files from the operator.")
    parser.add_argument("--fresh")
    parser.add_argument("--make")
    parser.add_argument("--too", action="append", default=[])
    parser.add_argument("paths", nargs="+")
    asked = parser.parse_args(argv)
    os.umask(0o077)
    try:
        sent = contents(stream)
        if len(sent) != len(asked.paths):
            raise Failed(f"{len(sent)} files were sent for {len(asked.paths)} names")
        receive(asked.paths, sent, asked.fresh, asked.too, asked.make)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write {error.filename or asked.paths[0]}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer))
