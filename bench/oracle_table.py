"""The ledger compared with llama-server, over every published layout: all cases as CSV, and a summary of the worst.

    python -m bench.oracle_table [--cases 40] [--jobs 3] [--layout NAME]

Each case starts a new llama-server with RPC devices (sandbox/oracle.py). The first run compiles it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.oracle_cases import Case, Comparison, matrix
from sandbox import oracle

RESULTS = Path(__file__).resolve().parent / "results" / "oracle_table.csv"
FIELDS = ("layout", "quant", "tokens", "slots", "unified", "kv_type", "ubatch", "flash_attention",
          "layers_by_device", "spilled_layers", "device", "part", "llama_server_mib", "ledger_mib",
          "off_mib", "within_tolerance")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Compare all cases, write the CSV file and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="of each layout")
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--layout", help="compare only this layout; write no CSV file")
    given = parser.parse_args(argv)
    cases = [case for case in matrix(given.cases) if given.layout in (None, case.layout)]
    oracle.build()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        comparisons = [
            figure for of_case in pool.map(lambda case: _compare(case, Path(folder)), cases) for figure in of_case
        ]
    if not given.layout:
        _write(comparisons)
    _summarise(comparisons)
    return 0


def _compare(case: Case, folder: Path) -> list[Comparison]:
    try:
        return case.compare(folder)
    except (oracle.OracleError, LookupError) as error:
        print(f"NOT ASKED {case.name}: {str(error)[-600:]}", file=sys.stderr)
        return []


def _write(comparisons: Sequence[Comparison]) -> None:
    with RESULTS.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(FIELDS)
        for figure in comparisons:
            case, context = figure.case, figure.case.context
            table.writerow((
                case.layout, case.quant, context.tokens, context.slots, int(context.unified), context.kv_type,
                context.ubatch_tokens, int(context.flash_attention), "+".join(map(str, case.counts)),
                len(case.spilled), figure.device, figure.part, figure.theirs_mib, round(figure.ours_bytes / 2**20, 2),
                figure.off_mib, int(figure.is_good),
            ))  # fmt: skip


def _summarise(comparisons: Sequence[Comparison]) -> None:
    bad = [figure for figure in comparisons if not figure.is_good]
    for figure in sorted(bad, key=lambda figure: abs(figure.off_mib)):
        print(f"{figure.off_mib:+6} of {figure.theirs_mib:6} MiB {figure.part} on {figure.device}: {figure.case.name}")
    cases = len({figure.case for figure in comparisons})
    print(f"{cases} cases, {len(comparisons)} figures, {len(bad)} out of tolerance")
    for part in ("weights", "repacked", "kv", "compute"):
        off = [figure.off_mib for figure in comparisons if figure.part == part]
        print(f"{part:9} lowest {min(off):+5} MiB, highest {max(off):+5} MiB, exact {off.count(0) / len(off):6.1%},"
              f" median {statistics.median(abs(difference) for difference in off):.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
