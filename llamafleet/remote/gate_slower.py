"""When is one pace of a server slower than another: the statistics of gate_pace.py, without a server.

Part of gate.py and under its contract: Python 3.8, standard library. A pace has for each of its requests the tokens a
second that were read ("prompt") and written ("decode"), and how many CPUs other programs used meanwhile ("others"; null
where that is not known). On a host where something else computes, a server is slower without being worse. So
requests of the new server count only while others compute no more than while the old server was measured, and where
others compute at all, a small difference does not count.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, Dict, List, Optional, Sequence, Tuple  # the contract is Python 3.8, whose own are typing's

KINDS = {"prompt": "prompt tokens/s read", "decode": "tokens/s written"}
# A smaller difference does not count, however certain: a start of a server differs from the next one as much. On a host
# where others compute, or nobody knows whether they do, neither does LOADED_DIFFERENCE.
LEAST_DIFFERENCE, LOADED_DIFFERENCE = 0.05, 0.3
# Of the CPUs, what a host without other work uses for itself.
QUIET_SHARE = 0.025
# Of a median of normal values: its standard error is 1.253 that of the mean; the median absolute deviation is 1/1.4826
# of their standard deviation. Three standard errors.
MEDIAN_ERROR, DEVIATION, ERRORS = 1.253, 1.4826, 3.0
# Two paces are a pair if no more time lies between them, a switch with its drain.
PAIR_SECONDS = 3600.0


def middle(values: Sequence[float]) -> Tuple[float, float]:
    """The median, and its standard error as a share of it, by the median absolute deviation of the logarithms."""
    logs = [math.log(value) for value in values]
    median = statistics.median(logs)
    spread = DEVIATION * statistics.median(abs(one - median) for one in logs)
    return math.exp(median), MEDIAN_ERROR * spread / math.sqrt(len(logs))


def is_slower(old: Sequence[float], new: Sequence[float], least: float) -> bool:
    """Whether the new speeds are lower by more than the spread of both, and by more than the share `least`."""
    (before, old_error), (now, new_error) = middle(old), middle(new)
    limit = max(-math.log(1 - least), ERRORS * math.hypot(old_error, new_error))
    return math.log(before / now) > limit


def slower(old: Dict[str, Any], new: Dict[str, Any], cpus: int) -> List[str]:
    """The kinds of speed, of KINDS, at which the new pace is slower."""
    least = LEAST_DIFFERENCE if is_quiet(old, cpus) and is_quiet(new, cpus) else LOADED_DIFFERENCE
    return [kind for kind in KINDS if is_slower(old[kind], new[kind], least)]


def is_quiet(pace: Dict[str, Any], cpus: int) -> bool:
    """Whether little else computed on the host while this was measured."""
    others = typical(pace)
    return others is not None and others <= QUIET_SHARE * cpus


def typical(pace: Dict[str, Any]) -> Optional[float]:
    """The CPUs that others used, the median of the requests; None where that is not known."""
    known = [one for one in pace["others"] if one is not None]
    return float(statistics.median(known)) if known else None


def most_others(old: Optional[Dict[str, Any]], cpus: int) -> float:
    """How many CPUs others may use while a request counts that is compared with this pace."""
    others = typical(old) if old is not None else None
    return math.inf if others is None else max(others, QUIET_SHARE * cpus)


def differs(old: Dict[str, Any], now: Dict[str, Any]) -> bool:
    """Whether a pace is of the same model and flags, but of another build, driver or kernel."""
    return old["key"] == now["key"] and any(old[one] != now[one] for one in ("release", "driver", "kernel"))


def is_pair(old: Dict[str, Any], now: Dict[str, Any]) -> bool:
    """Whether two paces of different builds were measured in one switch, so that nothing but the build differs."""
    same = all(old[one] == now[one] for one in ("driver", "kernel"))
    return differs(old, now) and same and 0 <= now["time"] - old["time"] < PAIR_SECONDS


def said(pace: Dict[str, Any], kind: str) -> str:
    """A speed with its spread, and the build that has it."""
    build = f"{str(pace['commit'])[:12]}, release {pace['release']}"
    return f"{figure(pace, kind)} ({build}{under(pace)})"


def figure(pace: Dict[str, Any], kind: str) -> str:
    median, error = middle(pace[kind])
    return f"{median:.1f} ± {ERRORS * error * median:.1f} {KINDS[kind]}"


def under(pace: Dict[str, Any]) -> str:
    return f", driver {pace['driver']}" if pace["driver"] else ""


def system(pace: Dict[str, Any]) -> str:
    """What the pace was measured under."""
    return f"kernel {pace['kernel']}{under(pace)}"


def said_slower(old: Dict[str, Any], new: Dict[str, Any], kinds: Sequence[str]) -> str:
    """What an operator should know of one build that is slower under another driver or kernel; empty if it is not."""
    if not kinds:
        return ""
    speeds = " and ".join(f"{figure(new, kind)} in place of {figure(old, kind)}" for kind in kinds)
    return f"slower since the driver or the kernel changed ({system(old)}; now {system(new)}): {speeds}"
