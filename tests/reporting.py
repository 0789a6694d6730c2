"""A fleet for the tests of the report: a box with a GPU, one with processors alone, one that was measured before its
build changed, one that cannot be reached; and texts that a page must not take for its own."""

import json
import random
from dataclasses import replace

from llamafleet.cli.report import page
from llamafleet.cli.reported import HostFacts, InstanceFacts, Measured
from llamafleet.cli.status import HostStatus, InstanceStatus
from llamafleet.host.answers import Gate
from llamafleet.host.learned import GatedSpeed
from llamafleet.planner.curves import curves
from llamafleet.settings.workload import Workload
from llamafleet.tuning.record import Fingerprint, Tuned
from llamafleet.tuning.records import Kept
from tests import planning

NOTHING_KEPT = Kept()
NOW = 1_796_000_000.0
HOSTILE = "<script>alert('x')</script>\"'&amp;\u202egpj\x1b[31m</style><img src=x onerror=alert(1)>"
LONG = "a-name-that-" + "goes-on-and-on-" * 12
CANDIDATES = (
    (0, "llama-server as it ships", 21.0), (1, "the plan", 19.4), (2, "as llama-server by default", 20.6),
    (3, "guesses by n-grams, up to 64", 12.4), (4, "guesses by n-grams, up to 16", 11.6), (5, "2 threads", 24.8),
    (6, "ubatch 1024", 19.0), (7, "guesses by n-grams, up to 16 + ubatch 1024", 11.3),
)  # fmt: skip


def trials(*, seed=1, joules=True, candidates=CANDIDATES, rounds=5):
    """Trials as a host records them, with the noise of one; the candidate after the last runs out of memory."""
    chance, found = random.Random(seed), []
    for turn in range(rounds):
        for number, label, seconds in candidates:
            took = seconds * chance.lognormvariate(0, 0.02)
            found.append(trial(number, label, took, joules=joules))
        if turn < 2:
            found.append(trial(len(candidates), "2 slots", None, "the server ended: out of memory (SIGKILL)"))
    return found


def trial(number, label, seconds, error=None, *, joules=False):
    guessed = "guesses" in label
    return {
        "id": f"{number}-{seconds}", "candidate": number, "label": label, "stage": 1, "error": error, "seconds": seconds,
        "prompt_tokens_per_s": 4000 / seconds if seconds else None,
        "decode_tokens_per_s": 400 / seconds if seconds else None,
        "drafted": 200 if guessed else 0, "accepted": 130 if guessed else 0, "spread": 1.01 if seconds else None,
        "prompt_tokens": 2048 if seconds else None, "reply_tokens": 128 if seconds else None,
        "state": {"throttled": None, "gpus": {}}, "joules": 45 * seconds if seconds and joules else None, "load_seconds": 3.0, "peak_bytes": 2**30,
        "load_average": 0.1, "started": NOW, "took_seconds": 30.0,
    }  # fmt: skip


def tuned(host, asked, plan, *, label="guesses by n-grams, up to 16 + ubatch 1024", gain=1.86, **changes):
    """A record of a tune as JSON gives it back."""
    work = Workload.of(asked.models[0], plan.context_tokens)
    mark = Fingerprint.of(host, asked, asked.models[0], build="b" * 16, model={"": [("m.gguf", 5, "a" * 64)]}, work=work,
                          text_sha256=None)  # fmt: skip
    value = {
        "schema": 1, "instance": "chat", "settings": {"speculation": "ngram", "draft_max_tokens": 16, "ubatch_tokens": 1024},
        "ended": NOW - 86400, "trials": trials(),
        "fingerprint": {**vars(mark), "gpus": [vars(gpu) for gpu in mark.gpus], "workload": vars(mark.workload)},
        "winner": {"label": label, "seconds": 11.3, "gain": gain, "low": gain - 0.07, "high": gain + 0.09,
                   "prompt_tokens_per_s": 354.0, "decode_tokens_per_s": 35.4},
        **changes,
    }  # fmt: skip
    record = Tuned.of(json.loads(json.dumps(value)))
    assert record is not None
    return record


def instance_status(name, plan, **changes):
    gpus = {gpu.uuid: row.used_bytes for gpu, row in zip(plan.gpus, plan.ledger, strict=False)}
    return replace(InstanceStatus(
        name=name, state="active", plan=f"{plan.context_tokens} x {plan.slots} {plan.kv_type}, {plan.backend}",
        release="b" * 16, rss_bytes=None, cgroup_bytes=plan.host_bytes, gpu_bytes=dict(gpus), planned_gpu_bytes=gpus,
        tokens_per_s=36.2, predicted_tokens_per_s=plan.predicted.tokens_per_s, restarts=0, liveness_restarts=0,
        last_liveness_restart="", since="", gate=Gate(True, time="2026-11-29T08:00:00Z"), verified=True, drift=(),
    ), **changes)  # fmt: skip


def instance(host, layout="Qwen3-8B", name="chat", *, measured=None, gated=GatedSpeed(36.2, 210.0), status=(), **asked):
    """An instance of a host with everything that is known of one, and what it was planned with."""
    settings = planning.settings({"name": name, **asked})
    [plan] = planning.plans(host, [(layout,)], settings)
    one = settings.models[0]
    facts = InstanceFacts(
        name, instance_status(name, plan, **dict(status)), f"hf:someone/{layout}-GGUF/{layout}-Q4_K_M.gguf", plan.argv,
        plan.why, plan.ledger, Workload.of(one, plan.context_tokens),
        curves(plan, one, planning.header(layout), host), gated, measured,
    )  # fmt: skip
    return facts, settings, plan


def gpu_box():
    host = planning.machine((24564,))
    facts, asked, plan = instance(host, "gpt-oss-120b", slots=4, concurrency=4, context_tokens=32768)
    faster = (
        (0, "llama-server as it ships", 21.0),
        (1, "the plan", 17.1),
        (2, "ubatch 1024", 16.0),
        (3, "2 threads", 25.2),
    )
    record = tuned(host, asked, plan, gain=1.31, label="ubatch 1024", settings={"ubatch_tokens": 1024},
                   trials=trials(seed=2, candidates=faster))  # fmt: skip
    facts = replace(facts, measured=Measured(record, stale=()))
    return HostFacts(HostStatus((facts.status,), free_bytes={"/var/lib/llamafleet": 300 * 2**30}), host, (facts,))


def cpu_box(name="chat", **changes):
    host = planning.machine(cpu={"model": "AMD EPYC 9354P 32-Core Processor", "physical_cores": 32, "logical_cores": 64,
                                 "performance_cores": 32})  # fmt: skip
    facts, asked, plan = instance(host, name=name)
    facts = replace(facts, measured=Measured(tuned(host, asked, plan), stale=()), **changes)
    return HostFacts(HostStatus((facts.status,)), host, (facts,))


def stale_box():
    """Measured with another build; and it has drifted."""
    host = planning.machine((12288, 12288))
    facts, asked, plan = instance(host, "Qwen3-8B", status={"drift": ("its unit differs",), "state": "active"})
    stale = ("another build of llama.cpp: bbbbbbbbbbbbbbbb before, cccccccccccccccc now",)
    facts = replace(facts, measured=Measured(tuned(host, asked, plan), "on gpu1", stale))
    return HostFacts(
        HostStatus((facts.status,), ("build",), problems=("GPU1: its fan is not seen: look at nvidia-smi",)),
        host,
        (facts,),
    )


def not_reached(problem="cannot be reached: the connection to 10.0.0.9 port 22 timed out", *, measured=True):
    """Not reached now, but measured before."""
    host = planning.machine()
    _, asked, plan = instance(host)
    kept = (InstanceFacts("chat", measured=Measured(tuned(host, asked, plan))),) if measured else ()
    return HostFacts(HostStatus(problem=problem), None, kept)


def fleet():
    return {"gpu1": gpu_box(), "cpu1": cpu_box(), "gpu2": stale_box(), "cpu9": not_reached(), "new1": HostFacts(
        HostStatus(), planning.machine(), ())}  # fmt: skip


def hostile():
    """Everything that comes from a host or an inventory says what it must not."""
    box = cpu_box()
    [one] = box.instances
    record = one.measured.record
    raw = {**record.raw, "trials": [{**one, "label": HOSTILE} for one in record.raw["trials"]]}
    record = replace(record, raw=raw, winner=replace(record.winner, label=HOSTILE))
    status = replace(one.status, state=HOSTILE, plan=HOSTILE, drift=(HOSTILE,), gpu_bytes=HOSTILE)
    one = replace(one, name=LONG, status=status, source=HOSTILE, argv=(HOSTILE,), why=(HOSTILE,), problems=(HOSTILE,),
                  measured=Measured(record, HOSTILE, (HOSTILE,)),
                  ledger=tuple(replace(row, device=HOSTILE) for row in one.ledger))  # fmt: skip
    machine = replace(box.machine, cpu=replace(box.machine.cpu, model=HOSTILE))
    return {HOSTILE: HostFacts(HostStatus((status,), (HOSTILE,), HOSTILE, problems=(HOSTILE,)), machine, (one,)),
            LONG: HostFacts(HostStatus(problem=LONG))}  # fmt: skip


def many(count=100):
    box, away = cpu_box(), not_reached(measured=False)
    return {f"box{n:03}.example.net": away if n % 17 == 0 else box for n in range(1, count + 1)}


def report(hosts):
    return page("llamafleet: fleet.py", hosts, NOW)
