"""Mutated headers of real models: refused or planned, never another exception, in bounded time and memory."""

import contextlib
import dataclasses
import json
import resource
import signal
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from llamafleet.cli import tables as show
from llamafleet.model.gguf import read_header
from llamafleet.model.gguf_cursor import GgufError
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from sandbox import models
from tests import planning

VOCABULARY = 300  # the smallest that sandbox.models makes; headers stay small
SECONDS = 10.0  # of one core; laying out hundreds of graphs for DeepSeek on several GPUs takes half of it
MEMORY_BYTES = 400 * 2**20  # beyond what the process has when the test starts
HUGE = (0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**62, 2**63, 2**64 - 1)
# Declared far beyond what is there, so that sizes in the header do not end the reading at once.
DECLARED_BYTES = 2**62
MACHINES = (
    planning.machine(),
    planning.machine([24564]),
    planning.machine([24564, {"total_mib": 12288, "pcie_width": 4}]),
    planning.machine([{"total_mib": 122500, "unified_memory": True}], ram_gib=122),
)
# No tests after this one may inherit its limit, and a search that finds something must find it again.
FUZZ = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
READ_SECONDS = 1.0  # of one core
ENDLESS_SECONDS = 120  # by the clock, on however slow a machine


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A file that is only in memory."""

    content: bytes
    size: int | None
    name: str = "mutant.gguf"

    def read(self, offset, length):
        return self.content[offset : offset + length]


class Headers(list):
    """Shown shortly: a failing example is not to print a megabyte."""

    def __repr__(self):
        return f"<{len(self)} headers>"

    def draw(self, data):
        """One of them, told by its number."""
        return self[data.draw(strategies.integers(0, len(self) - 1))]


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    found = Headers()
    for layout in models.PUBLISHED.values():
        path = models.weightless(folder, dataclasses.replace(layout, vocab=VOCABULARY))
        with path.open("rb") as file:
            found.append(file.read(2**20).rstrip(b"\0") + bytes(64))  # what follows is the hole for weights
        path.unlink()
    return found


@contextlib.contextmanager
def no_longer_than(seconds):
    """What never ends is to fail, not to hold up all tests."""

    def end(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def memory_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def examples(few, many):
    """Run the test with so many examples, and in `make test-long` with the larger number."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.long)])


def survives(content, size=DECLARED_BYTES, context_tokens=None, machines=MACHINES):
    """Read it and plan it on the machines; True if it was planned."""
    asked = planning.settings({"context_tokens": context_tokens, "kv_types": ["f16", "q8_0"]})
    began = time.process_time()
    try:
        header = read_header([Bytes(content, size)])
    except GgufError as error:
        assert len(str(error)) < 1000
        assert str(error).isprintable()
        assert time.process_time() - began < READ_SECONDS
        return False
    assert time.process_time() - began < READ_SECONDS
    for host in machines:
        began = time.process_time()
        with no_longer_than(ENDLESS_SECONDS):
            [answer] = plan_host(host, [(asked.models[0], header)], asked)
        assert time.process_time() - began < SECONDS
        assert isinstance(answer, Plan | Refusal)
        json.dumps(answer.to_json(), allow_nan=False)
        assert "\x1b" not in show.table(answer, header.name)
    return True


def test_the_headers_themselves_are_planned(headers):
    assert all(survives(content) for content in headers)


@examples(60, 1000)
def test_bytes_changed_anywhere(headers, count):
    @settings(FUZZ, max_examples=count)
    @given(strategies.data())
    def check(data):
        content = bytearray(headers.draw(data))
        places = strategies.integers(0, len(content) - 8)
        for at in data.draw(strategies.lists(places, min_size=1, max_size=4)):
            content[at : at + 8] = struct.pack(
                "<Q", data.draw(strategies.sampled_from(HUGE) | strategies.integers(0, 2**64 - 1))
            )
        survives(bytes(content), data.draw(strategies.sampled_from((DECLARED_BYTES, len(content), None))))

    check()


@examples(60, 1000)
def test_pieces_cut_out_or_doubled(headers, count):
    @settings(FUZZ, max_examples=count)
    @given(strategies.data())
    def check(data):
        content = headers.draw(data)
        start, end, again = (data.draw(strategies.integers(0, len(content))) for _ in range(3))
        survives(content[:again] + content[min(start, end) : max(start, end)] * data.draw(strategies.integers(0, 3)))

    check()


VALUES = {
    4: strategies.sampled_from(HUGE).map(lambda n: struct.pack("<I", n % 2**32)) | strategies.integers(0, 600).map(lambda n: struct.pack("<I", n)),
    5: strategies.integers(-(2**31), 2**31 - 1).map(lambda n: struct.pack("<i", n)),
    6: strategies.floats(width=32).map(lambda n: struct.pack("<f", n)),
    7: strategies.booleans().map(lambda n: struct.pack("<?", n)),
    8: strategies.text(max_size=20).map(lambda n: struct.pack("<Q", len(n.encode())) + n.encode()),
    10: strategies.sampled_from(HUGE).map(lambda n: struct.pack("<Q", n)),
    11: strategies.integers(-(2**63), 2**63 - 1).map(lambda n: struct.pack("<q", n)),
    12: strategies.floats().map(lambda n: struct.pack("<d", n)),
}  # fmt: skip


@strategies.composite
def values(draw):
    """A metadata value of any type, also arrays of any length, told truly or not."""
    kind = draw(strategies.sampled_from([4, *VALUES]))
    if draw(strategies.integers(0, 3)):
        return struct.pack("<I", kind) + draw(VALUES[kind])
    parts = draw(strategies.lists(VALUES[kind], max_size=90))
    told = draw(strategies.sampled_from((len(parts), len(parts), 2**20, 2**62)))
    return struct.pack("<IIQ", 9, kind, told) + b"".join(parts)


@examples(25, 300)
def test_metadata_with_other_values(headers, count):
    """Every number of the model may lie: the planner gets what the reader lets through."""
    planned = []

    @settings(FUZZ, max_examples=count)
    @given(strategies.data())
    def check(data):
        content = headers.draw(data)
        for key, wild in data.draw(strategies.lists(strategies.sampled_from(KEYS), min_size=1, max_size=3)):
            content = _replaced(content, key, data.draw(values()) if wild else _small(data))
        tokens = data.draw(strategies.sampled_from((None, 256, 131072, 2**31 - 1)))
        planned.append(
            survives(content, context_tokens=tokens, machines=[data.draw(strategies.sampled_from(MACHINES))])
        )

    check()
    assert sum(planned) > len(planned) / 3  # a reader that refuses everything would show little


def _small(data):
    return struct.pack("<II", 4, data.draw(strategies.integers(0, 600)))


NAMES = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window",
    "attention.sliding_window_pattern", "expert_count", "expert_used_count", "expert_feed_forward_length",
    "ssm.inner_size", "ssm.state_size", "ssm.group_count", "ssm.conv_kernel", "full_attention_interval",
    "attention.shared_kv_layers", "nextn_predict_layers", "attention.key_length_mla", "attention.value_length_mla",
    "attention.recurrent_layers", "attention.kv_lora_rank", "shortconv.l_cache", "leading_dense_block_count", "vocab_size", "rope.dimension_count",
)  # fmt: skip
KEYS = [(name, wild) for name in NAMES for wild in (True, False)]


def _replaced(content, name, value):
    """The header with this key of the architecture set: its value replaced, or the key added in front."""
    arch_at = content.index(b"general.architecture") + len("general.architecture") + 4
    [length] = struct.unpack_from("<Q", content, arch_at)
    key = content[arch_at + 8 : arch_at + 8 + length] + b"." + name.encode()
    at = content.find(struct.pack("<Q", len(key)) + key)
    if at < 0:
        [keys] = struct.unpack_from("<Q", content, 16)
        added = struct.pack("<Q", len(key)) + key + value
        return content[:16] + struct.pack("<Q", keys + 1) + added + content[24:]
    after = at + 8 + len(key)
    return content[:after] + value + content[after + 4 + _length(content, after) :]


def _length(content, at):
    """Bytes of a value behind its type."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    [kind] = struct.unpack_from("<I", content, at)
    if kind == 8:
        return 8 + struct.unpack_from("<Q", content, at + 4)[0]
    if kind == 9:
        inner, count = struct.unpack_from("<IQ", content, at + 4)
        return 12 + count * sizes.get(inner, 0)
    return sizes[kind]
