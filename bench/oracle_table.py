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
        found = [one for many in pool.map(lambda case: _compare(case, Path(folder)), cases) for one in many]
    if not given.layout:
        _write(found)
    _summarise(found)
    return 0


def _compare(case: Case, folder: Path) -> list[Comparison]:
    try:
        return case.compare(folder)
    except (oracle.OracleError, LookupError) as error:
        print(f"NOT ASKED {case.name}: {str(error)[-600:]}", file=sys.stderr)
        return []


def _write(found: Sequence[Comparison]) -> None:
    with RESULTS.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(FIELDS)
        for one in found:
            case, asked = one.case, one.case.context
            table.writerow((case.layout, case.quant, asked.tokens, asked.slots, int(asked.unified), asked.kv_type,
                            asked.ubatch_tokens, int(asked.flash_attention), "+".join(map(str, case.counts)),
                            len(case.spilled), one.device, one.part, one.theirs_mib, round(one.ours_bytes / 2**20, 2),
                            one.off_mib, int(one.is_good)))  # fmt: skip


def _summarise(found: Sequence[Comparison]) -> None:
    bad = [one for one in found if not one.is_good]
    for one in sorted(bad, key=lambda one: abs(one.off_mib)):
        print(f"{one.off_mib:+6} of {one.theirs_mib:6} MiB {one.part} on {one.device}: {one.case.name}")
    cases = len({one.case for one in found})
    print(f"{cases} cases, {len(found)} figures, {len(bad)} out of tolerance")
    for part in ("weights", "repacked", "kv", "compute"):
        off = [one.off_mib for one in found if one.part == part]
        print(f"{part:9} lowest {min(off):+5} MiB, highest {max(off):+5} MiB, exact {off.count(0) / len(off):6.1%},"
              f" median {statistics.median(abs(one) for one in off):.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
