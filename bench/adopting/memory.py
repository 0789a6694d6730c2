"""The ledger against llama-server of another release: every published layout and every outline of an architecture."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from bench.adopting.change import Change
from bench.oracle_cases import Case, matrix
from bench.outline_cases import OUTLINES, Situation, compared, is_right, situations
from llamafleet.memory.kv_cache import takes_cache_of
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import read_path
from llamafleet.units import MIB
from sandbox import outlines
from sandbox.layouts import PUBLISHED
from sandbox.oracle import Oracle, OracleError

SITUATIONS = 3  # of each published layout, as in tests/oracle/test_ledger_oracle.py
# Where this project has the rules of each part.
RULES = {
    "weights": "llamafleet/memory/weights.py",
    "repacked": "llamafleet/memory/weights.py",
    "cache": "llamafleet/memory/kv_cache.py",
    "compute": "llamafleet/memory/graph/",
    "load": "llamafleet/model/",
}
_LOG_LINE = re.compile(r"^(?:[\d.]+ )?[DIWE] ")  # time and level before llama-server's words


@dataclass(frozen=True)
class Figure:
    """One part on one device in one situation; a model that is not loaded has one figure, with the part "load"."""

    model: str  # the published layout's or the outline's name
    architecture: str
    situation: str
    device: str
    part: str
    ours_mib: float
    theirs_mib: float
    is_right: bool
    reason: str = ""  # why it is not loaded

    @property
    def off_mib(self) -> float:
        """The ledger's figure less llama-server's."""
        return self.ours_mib - self.theirs_mib

    @property
    def off_share(self) -> float:
        """The same as a share of llama-server's figure."""
        return abs(self.off_mib) / self.theirs_mib if self.theirs_mib else float(self.off_mib != 0)


Question = Callable[[], list[Figure]]


def figures(oracle: Oracle, folder: Path, jobs: int) -> list[Figure]:
    """Ask llama-server for everything; models are written to `folder`."""
    questions = [*_layouts(oracle, folder), *_outlines(oracle, folder)]
    with ThreadPoolExecutor(jobs) as pool:
        return [figure for many in pool.map(lambda question: question(), questions) for figure in many]


def _layouts(oracle: Oracle, folder: Path) -> Iterator[Question]:
    for case in matrix(SITUATIONS):
        yield partial(_of_layout, case, oracle, folder)


def _of_layout(case: Case, oracle: Oracle, folder: Path) -> list[Figure]:
    architecture = PUBLISHED[case.layout].architecture
    try:
        found = case.compare(folder, oracle)
    except OracleError as error:
        return [_not_loaded(case.layout, architecture, case.name, error)]
    return [
        Figure(case.layout, architecture, case.name, one.device, "cache" if one.part == "kv" else one.part,
               one.ours_bytes / MIB if one.part == "compute" else one.ours_bytes // MIB, one.theirs_mib, one.is_good)
        for one in found
    ]  # fmt: skip


def _outlines(oracle: Oracle, folder: Path) -> Iterator[Question]:
    for outline in sorted(OUTLINES.glob("*.yaml")):
        path = outlines.weightless(outline, folder)
        header = read_path(path)
        model = Model.of(header)
        for name, situation in situations(model.layers).items():
            if takes_cache_of(model.shape, situation[0].kv_type):
                yield partial(_of_outline, outline, path, model, name, situation, oracle)


def _of_outline(
    outline: Path, path: Path, model: Model, name: str, situation: Situation, oracle: Oracle
) -> list[Figure]:
    said = outlines.read(outline)
    architecture = str(said["architecture"])
    try:
        found = list(compared(path, model, situation, oracle))
    except OracleError as error:
        return [_not_loaded(outline.stem, architecture, name, error)]
    return [
        Figure(outline.stem, architecture, name, device, part, ours, theirs, is_right(part, ours, theirs, said))
        for device, part, ours, theirs in found
    ]


def _not_loaded(model: str, architecture: str, situation: str, error: OracleError) -> Figure:
    return Figure(model, architecture, situation, "", "load", 0, 0, False, reason(str(error)))


def reason(message: str) -> str:
    """llama-server's own words for why it does not load a model: the first line of its log that tells of an error."""
    lines = [_LOG_LINE.sub("", line).strip() for line in message.splitlines()[1:]]
    telling = [line for line in lines if re.search(r"error|invalid|unknown|unsupported|failed|missing", line, re.I)]
    return (telling or lines or [message])[0][:200]


def changes(found: Sequence[Figure], source_of: Callable[[str], str]) -> Iterator[Change]:
    """A row for each model and part that is off, the parts in the order of `RULES`.

    `source_of`: what changed in the source for an architecture, "" if nothing did.
    """
    wrong = [figure for figure in found if not figure.is_right]
    order = {part: number for number, part in enumerate(RULES)}
    wrong.sort(key=lambda figure: (order[figure.part], figure.model))
    for (part, model), group in groupby(wrong, key=lambda figure: (figure.part, figure.model)):
        rows = list(group)
        asked = [figure for figure in found if figure.model == model and part in {figure.part, "load"}]
        count = len({figure.situation for figure in asked}) if part == "load" else len(asked)
        yield _change(model, part, rows, count, source_of(rows[0].architecture))


def _change(model: str, part: str, wrong: Sequence[Figure], asked: int, source: str) -> Change:
    look_at = RULES[part] + (f"; {source}" if source else "")
    if part == "load":
        return Change(model, "loads", f"does not load in {len(wrong)} of {asked}: {wrong[0].reason}", look_at)
    worst = max(wrong, key=lambda figure: abs(figure.off_mib))
    median = statistics.median(abs(figure.off_mib) for figure in wrong)
    share = f"{len(wrong)} of {asked} figures off, median {median:.2f} MiB"
    return Change(
        f"{model}: {part} on {worst.device}",
        f"{worst.ours_mib:.2f} MiB by the ledger",
        f"{worst.theirs_mib:.2f} MiB ({worst.off_mib:+.2f}; {share}; worst in: {worst.situation})",
        look_at,
    )


def by_situation(found: Sequence[Figure]) -> Iterator[str]:
    """How many compute buffers of the outlines' models are off, by situation: one cause is often in one of them."""
    small = {path.stem for path in OUTLINES.glob("*.yaml")}
    asked = [figure for figure in found if figure.part == "compute" and figure.model in small]
    for situation in dict.fromkeys(figure.situation for figure in asked):
        rows = [figure for figure in asked if figure.situation == situation]
        wrong = sum(not figure.is_right for figure in rows)
        if wrong:
            yield f"  {wrong} of {len(rows)} with {situation}"


def summary(found: Sequence[Figure]) -> Iterator[str]:
    """A line for each part: how many figures are off, by how much in the middle and at worst."""
    for part in RULES:
        asked = [figure for figure in found if figure.part == part]
        wrong = [figure for figure in asked if not figure.is_right]
        if part == "load" or not asked:
            if wrong:
                yield f"{len({figure.model for figure in wrong})} models are not loaded in {len(wrong)} situations"
            continue
        text = f"{part}: {len(wrong)} of {len(asked)} figures off, in {len({figure.model for figure in wrong})} models"
        if wrong:
            median = statistics.median(figure.off_share for figure in wrong)
            yield f"{text}; median {median:.2%}, worst {max(abs(figure.off_mib) for figure in wrong):.2f} MiB"
            if part == "compute":
                yield from by_situation(found)
        else:
            yield text


def write(found: Sequence[Figure], file: Path) -> None:
    """All figures as CSV."""
    with file.open("w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(("model", "architecture", "situation", "device", "part", "ledger_mib", "llama_server_mib",
                        "right", "reason"))  # fmt: skip
        for one in found:
            table.writerow((one.model, one.architecture, one.situation, one.device, one.part, round(one.ours_mib, 2),
                            one.theirs_mib, int(one.is_right), one.reason))  # fmt: skip
