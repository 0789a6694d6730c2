"""Put a new configuration of this host's monitoring into service: node-exporter with the timer of its metrics, and
Prometheus where it is to run.

Contract: `monitoring_apply.py show` prints {"prometheus", "exporter": the program's path or null, "digest": of the
configuration in service or null, "units": {name of a unit of ours: {"sha256", "active", "enabled"}}} and changes
nothing. `monitoring_apply.py apply STAGED DIGEST` takes the staged files (units of ours, and the files of a
configuration), lets promtool check them, starts what has changed, and stops the units that are not staged. Prints
progress; the last line of a failure begins with `error: `. Exit 0 all of it runs; 1 failed, and what ran before runs
again. Killed at any point it can be run again. Root, systemd, Prometheus and node-exporter of the distribution; the
standard library, Python 3.8; common.py and staged.py beside it.

Decision 26: docs/decisions/0026-watched-by-standard-parts.md.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional

import common
import staged
from common import listing, read_file, replace_file, replace_link

UNITS = (common.EXPORTER_UNIT, common.METRICS_UNIT, common.METRICS_TIMER, common.PROMETHEUS_UNIT)
# Those that run by themselves: the timer starts its service.
STARTED = (common.EXPORTER_UNIT, common.METRICS_TIMER, common.PROMETHEUS_UNIT)
EXPORTERS = ("prometheus-node-exporter", "node_exporter")
# Prometheus reads what it has written before it answers: of a year, minutes.
READY_SECONDS, POLL_SECONDS = 300.0, 0.5
# A program that cannot listen ends within a second.
SETTLE_SECONDS = 3.0


class Failed(Exception):
    """The text says why."""


def unit_path(unit: str) -> str:
    return f"{common.UNITS}/{unit}"


def show() -> Dict[str, Any]:
    """As the contract says."""
    units = {}
    for unit in UNITS:
        text = read_file(unit_path(unit))
        if text is not None:
            units[unit] = {"sha256": common.sha256(text), "active": staged.is_so("is-active", unit),
                           "enabled": staged.is_so("is-enabled", unit)}  # fmt: skip
    return {
        "prometheus": program("prometheus"),
        "exporter": program(*EXPORTERS),
        "digest": staged.in_service(common.MONITORING),
        "units": units,
    }


def program(*names: str) -> Optional[str]:
    """Where the first of these programs lies that the PATH has."""
    found = next(filter(None, map(shutil.which, names)), None)
    return os.path.realpath(found) if found else None


def apply(arrived: str, digest: str) -> None:
    """Raises `Failed`, OSError, and CalledProcessError of systemctl."""
    folder = staged.take(common.MONITORING, arrived, digest)
    wanted = {unit: text for unit in UNITS for text in [read_file(f"{folder}/{unit}")] if text is not None}
    check(folder)
    before = {unit: read_file(unit_path(unit)) for unit in UNITS}
    old = staged.in_service(common.MONITORING)
    replace_link(staged.link(common.MONITORING), digest)
    try:
        install(wanted, digest != old)
    except (Failed, subprocess.CalledProcessError) as failed:
        put_back(before, old, digest, str(failed))
    for name in listing(common.MONITORING):
        if name not in (digest, "current"):
            shutil.rmtree(f"{common.MONITORING}/{name}", ignore_errors=True)


def check(folder: str) -> None:
    """Raises `Failed` with what promtool finds wrong, and removes the folder."""
    text = read_file(f"{folder}/prometheus.yml")
    if text is None:
        return
    # promtool looks for the keys, which Prometheus is given when it starts: here they lie in the folder.
    trial = f"{folder}/.trial.yml"
    credentials = f"/run/credentials/{common.PROMETHEUS_UNIT}".encode()
    common.write_file(trial, text.replace(credentials, folder.encode()))
    done = subprocess.run(["promtool", "check", "config", trial], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)  # fmt: skip
    os.unlink(trial)
    if done.returncode:
        said = " | ".join(line.strip() for line in done.stdout.splitlines()[-5:])
        if os.path.basename(folder) != staged.in_service(common.MONITORING):
            shutil.rmtree(folder, ignore_errors=True)
        raise Failed(f"promtool refuses the configuration, and the monitoring stays as it is: {said}")


def install(wanted: Dict[str, bytes], is_new: bool) -> None:
    """These units run, and no others of ours. Raises `Failed` and CalledProcessError."""
    changed = [unit for unit, text in wanted.items() if read_file(unit_path(unit)) != text]
    for unit in UNITS:
        if unit not in wanted and os.path.lexists(unit_path(unit)):
            common.systemctl("disable", "--now", "--quiet", unit, check=False)
            os.unlink(unit_path(unit))
    for unit in changed:
        replace_file(unit_path(unit), wanted[unit])
    common.systemctl("daemon-reload")
    for unit in [unit for unit in STARTED if unit in wanted]:
        if not staged.is_so("is-enabled", unit):
            common.systemctl("enable", "--quiet", unit)
        # The configuration is Prometheus' own, with the keys that it is given when it starts.
        if unit in changed or (unit == common.PROMETHEUS_UNIT and is_new) or not staged.is_so("is-active", unit):
            common.systemctl("restart", unit)
    wait_for([unit for unit in STARTED if unit in wanted], wanted.get(common.PROMETHEUS_UNIT))


def wait_for(units: List[str], prometheus: Optional[bytes]) -> None:
    """Until all of them run and Prometheus answers. Raises `Failed`."""
    time.sleep(SETTLE_SECONDS)
    end = time.monotonic() + READY_SECONDS
    found = re.search(rb"--web\.listen-address=127\.0\.0\.1:(\d+)", prometheus or b"")
    while True:
        for unit in units:
            if not staged.is_so("is-active", unit):
                raise Failed(f"{unit} does not run: {journal(unit)}")
        if found is None or is_ready(int(found.group(1))):
            return
        if time.monotonic() > end:
            raise Failed(f"Prometheus does not answer after {READY_SECONDS:.0f} s: {journal(common.PROMETHEUS_UNIT)}")
        time.sleep(POLL_SECONDS)


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def journal(unit: str) -> str:
    lines = common.output_of(["journalctl", "--quiet", "--no-pager", "--output=cat", "--lines=30", "-u", unit])
    told = [line for line in lines.splitlines() if "level=error" in line or "address already in use" in line]
    return " | ".join(told[-2:]) or f"see journalctl -u {unit}"


def put_back(before: Dict[str, Optional[bytes]], old: Optional[str], digest: str, why: str) -> None:
    """What ran before runs again. Raises `Failed` with why the new one does not."""
    if old is None:
        os.unlink(staged.link(common.MONITORING))
    else:
        replace_link(staged.link(common.MONITORING), old)
    try:
        install({unit: text for unit, text in before.items() if text is not None}, True)
    except (Failed, subprocess.CalledProcessError) as failed:
        raise Failed(f"{why}; and what ran before does not run either: {failed}") from failed
    if old != digest:
        shutil.rmtree(f"{common.MONITORING}/{digest}", ignore_errors=True)
    raise Failed(f"{why}; the monitoring is as it was before")


def main(argv: List[str]) -> int:
    if argv[0] == "show":
        print(json.dumps(show()))
        return 0
    os.umask(0o022)
    try:
        apply(argv[1], argv[2])
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
