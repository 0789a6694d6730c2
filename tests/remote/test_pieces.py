"""The list of pieces is another host's word: whatever it has, it is read within bounds or refused."""

import hashlib
import json

import pieces
import pytest

BODY = b"GGUF" + bytes(range(256)) * 65536  # two pieces and 4 bytes
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(BODY)
    digest, sums = pieces.of(str(path))
    return pieces.text(digest, len(BODY), sums)


def test_a_list_has_the_sum_of_each_piece(listed):
    sums = pieces.read(listed.encode(), SHA, len(BODY))
    cut = [BODY[: pieces.PIECE_BYTES], BODY[pieces.PIECE_BYTES : 2 * pieces.PIECE_BYTES], BODY[-4:]]
    assert sums == [hashlib.sha256(one).hexdigest() for one in cut]
    assert [pieces.length(number, len(BODY)) for number in range(3)] == [len(one) for one in cut]
    assert len(listed) <= pieces.most_bytes(len(BODY))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sha256": "0" * 64}, "its sha256 is"),
        ({"size_bytes": len(BODY) - 1}, "its size_bytes is"),
        ({"schema": True}, "its schema is True"),
        ({"piece_bytes": 4096}, "its piece_bytes is 4096"),
        ({"pieces": []}, "should have 3 pieces"),
        ({"pieces": ["0" * 64, "0" * 64, "x" * 4000]}, "is no sha256"),
        ({"pieces": None}, "should have 3 pieces"),
    ],
)
def test_another_list_is_refused(listed, change, problem):
    with pytest.raises(ValueError, match=problem) as refused:
        pieces.read(json.dumps({**json.loads(listed), **change}).encode(), SHA, len(BODY))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"[" * 100000, b"\xff"])
def test_what_is_no_list_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        pieces.read(data, SHA, len(BODY))
