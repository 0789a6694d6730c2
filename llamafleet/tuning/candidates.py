"""What a tune measures: llama-server as it ships, the planner's best, and a few changes of what the operator left open.

Pure. A candidate is settings of the instance, planned by the ordinary planner: what does not fit is never run, and
what wins could have been written into the inventory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from llamafleet.host.machine import Cpu, Machine
from llamafleet.memory.context import types_of
from llamafleet.memory.ledger import may_repack
from llamafleet.model import speculation as kinds
from llamafleet.model.gguf import Header
from llamafleet.planner.plan import plan_host
from llamafleet.planner.processors import computes, cores, usable_cpus
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Instance, Settings
from llamafleet.settings.speculation import AUTO
from llamafleet.settings.workload import Workload
from llamafleet.tuning.race import BASELINE, Screened, combinations

SHIPPED, PLANNED = "llama-server as it ships", "the plan"
SPECULATION = "speculation"  # the dimension of guesses
DEFAULTS = "defaults"  # a dimension that is not combined with others: it sets what several of them do
GUESSES = "guesses ahead"
# A model goes on after words by chance as it likes, and repeats itself: what is accepted then says nothing of a user's.
WITHOUT_TEXT = "the prompts are words by chance: set tune_prompt_file to a text such as the server's users send"
PLANNED_NUMBER = 1  # of the planner's best, to which the changes are made
DEFAULT_UBATCH, DEFAULT_BATCH = 512, 2048  # common/common.h, n_ubatch and n_batch
LEAST_UBATCH, MOST_UBATCH = 64, 8192
# Most tokens that are guessed at once, for each kind: llama.cpp's own number among them (common/common.h).
LENGTHS: Mapping[str, Sequence[int]] = {"ngram": (64, 16), kinds.MTP: (3, 1), kinds.DRAFT: (8, 3)}
OTHER_LENGTHS = (3, 8)

Planner = Callable[[Instance], Plan | Refusal]


@dataclass(frozen=True)
class Change:
    """Settings that differ from what the operator asked for; `dimension` names the thing that they change."""

    label: str
    dimension: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Candidate(Change):
    """A change with its plan. The baseline's has the flags of llama-server as it ships."""

    plan: Plan


@dataclass(frozen=True)
class Lost:
    """A change that is not run, and why."""

    label: str
    why: str


def planner_of(
    machine: Machine,
    requests: Sequence[tuple[Instance, Header]],
    settings: Settings,
    name: str,
    companions: Mapping[str, Mapping[str, Header]] = MappingProxyType({}),
    **others: Any,
) -> Planner:
    """Plans the instance `name` with other settings, beside the other instances as they are. `others`: as of
    `plan_host`."""

    def plan(instance: Instance) -> Plan | Refusal:
        changed = [(instance if one.name == name else one, header) for one, header in requests]
        results = plan_host(machine, changed, settings, companions=companions, **others)
        return next(result for (one, _), result in zip(changed, results, strict=True) if one.name == name)

    return plan


def candidates(
    instance: Instance, machine: Machine, planner: Planner, companions: Mapping[str, Header] = MappingProxyType({})
) -> tuple[tuple[Candidate, ...], tuple[Lost, ...]] | Refusal:
    """The baseline, the planner's best and its changes, those first that promise most; and what does not fit. Two
    candidates with the same command line are one."""
    best = planner(instance)
    if isinstance(best, Refusal):
        return best
    found = [
        Candidate(SHIPPED, "", {}, replace(best, argv=shipped_flags(best), cpus=instance.cpus or "", numa_nodes="")),
        Candidate(PLANNED, "", {}, best),
    ]
    guesses = instance.speculation == AUTO and not instance.tune_prompt_file
    lost: list[Lost] = [Lost(GUESSES, WITHOUT_TEXT)] if guesses and not best.pooling else []
    for change in changes(instance, best, machine, companions):
        made = with_change(instance, planner, change)
        if isinstance(made, Lost):
            lost.append(made)
        elif all(_same(made.plan) != _same(one.plan) for one in found):
            found.append(made)
    return tuple(found), tuple(lost)


def with_change(instance: Instance, planner: Planner, change: Change) -> Candidate | Lost:
    """The change, planned; or why it cannot be."""
    plan = planner(replace(instance, **change.settings))
    if isinstance(plan, Refusal):
        return Lost(change.label, plan.reason)
    return Candidate(change.label, change.dimension, change.settings, plan)


def combined(instance: Instance, planner: Planner, found: Sequence[Candidate], screened: Screened) -> list[Candidate]:
    """What won in each dimension, put together and planned; those that do not fit, or are the same as another one, are
    left out."""
    made: list[Candidate] = []
    of = {n: 0 if found[n].dimension == DEFAULTS else one for n, one in enumerate(dimensions(found))}
    for members in combinations(screened, of):
        several = [found[member] for member in members]
        settings = {key: value for one in several for key, value in one.settings.items()}
        whole = with_change(instance, planner, Change(" + ".join(one.label for one in several), "", settings))
        if isinstance(whole, Candidate) and all(_same(whole.plan) != _same(one.plan) for one in (*found, *made)):
            made.append(whole)
    return made


def dimensions(found: Sequence[Candidate]) -> list[int]:
    """The number of each candidate's dimension; 0 of the baseline and of the planner's best."""
    names = list(dict.fromkeys(one.dimension for one in found if one.dimension))
    return [names.index(one.dimension) + 1 if one.dimension else BASELINE for one in found]


def _same(plan: Plan) -> tuple[object, ...]:
    return plan.argv, plan.cpus, plan.numa_nodes


def shipped_flags(plan: Plan) -> tuple[str, ...]:
    """The planned part of the command line of llama-server as it ships, for the same slots, context and cache: it
    chooses layers, ubatch, batch, threads and loading by itself (`--fit on` is its default)."""
    pool = plan.argv[plan.argv.index("--ctx-size") + 1]
    unified = next(flag for flag in plan.argv if flag in ("--kv-unified", "--no-kv-unified"))
    flags = ["--ctx-size", pool, "--parallel", str(plan.slots), unified]
    if plan.kv_type != "f16":
        key, value = types_of(plan.kv_type)
        flags += ["--cache-type-k", key, "--cache-type-v", value]
    if plan.pooling:
        # Else no input that is longer than its 512 tokens would be answered at all.
        flags += ["--rerank"] if plan.pooling == "rank" else ["--embedding", "--pooling", plan.pooling]
        flags += ["--batch-size", str(plan.ubatch_tokens), "--ubatch-size", str(plan.ubatch_tokens)]
    return tuple(flags)


# --- changes ----------------------------------------------------------------------------------------


def changes(instance: Instance, plan: Plan, machine: Machine, companions: Mapping[str, Header]) -> Iterator[Change]:
    """Changes of what the operator left open, the promising ones first."""
    if not plan.pooling:
        yield from _defaults(instance, machine.cpu)
    if instance.speculation == AUTO and instance.tune_prompt_file:
        yield from _guesses(instance, companions)
    if computes(plan.placement):
        of_processor = (_threads(instance, plan, machine.cpu), _orders(instance, plan))
        # What an order of weights changes most is how fast prompts are read.
        for some in reversed(of_processor) if _reads_longer(instance, plan) else of_processor:
            yield from some
    if plan.placement.moved and instance.spilled_layers is None:
        yield from _spilled(plan)
    if instance.ubatch_tokens is None and not plan.pooling:
        yield from _ubatches(instance, plan)
    if instance.slots is None and instance.concurrency > 1:
        counts = sorted({1, -(-instance.concurrency // 2), instance.concurrency} - {plan.slots}, reverse=True)
        yield from (Change(f"{count} slots", "slots", {"slots": count}) for count in counts)
    if len(instance.kv_types) > 1:
        others = [kv_type for kv_type in instance.kv_types if kv_type != plan.kv_type]
        yield from (Change(f"cache of {one}", "cache", {"kv_types": (one,)}) for one in others)
    if instance.split_mode == "auto":
        other = "layer" if "tensor" in plan.argv else "tensor"
        yield Change(f"split by {other}", "split", {"split_mode": other})
    if instance.op_offload and plan.gpus and plan.placement.uses_host:
        yield Change("no op-offload", "op-offload", {"op_offload": False})
    if instance.numa == "auto" and plan.numa_nodes:
        yield Change("memory of the own NUMA node", "numa", {"numa": "local"})


def _defaults(instance: Instance, cpu: Cpu) -> Iterator[Change]:
    """Planned flags with llama-server's own numbers, for a host where these are better than the plan's. Its threads are
    the physical cores, of a hybrid the performance cores (common/common.cpp, common_cpu_get_num_math); here no more
    than the CPUs that the operator named."""
    usual = {"ubatch_tokens": min(DEFAULT_UBATCH, instance.batch_tokens or DEFAULT_BATCH),
             "batch_tokens": max(DEFAULT_BATCH, instance.ubatch_tokens or 0),
             "threads": cores(cpu, instance)}  # fmt: skip
    opened = {key: value for key, value in usual.items() if getattr(instance, key) is None}
    if opened:
        yield Change("as llama-server by default", DEFAULTS, opened)


def _guesses(instance: Instance, companions: Mapping[str, Header]) -> Iterator[Change]:
    """Ways to guess ahead: by n-grams, by the model's own head, by the draft whose kind its header tells. What does not
    fit the model the planner refuses."""
    ways = ["ngram", kinds.MTP]
    if draft := companions.get("draft"):
        ways.append(kind_of_draft(draft))
    for kind in ways:
        for most in LENGTHS.get(kind, OTHER_LENGTHS):
            settings = {"speculation": kind, "draft_max_tokens": most}
            if kind == "ngram":
                settings["draft_min_tokens"] = min(most, LEAST_GUESSED)
            if kind not in (kinds.DRAFT, *kinds.READERS):
                settings["draft"] = None
            yield Change(f"guesses by {WORDS.get(kind, kind)}, up to {most}", SPECULATION, settings)


# Few tokens already save time where a text is repeated in pieces.
LEAST_GUESSED = 4
WORDS = {"ngram": "n-grams", kinds.MTP: "the model's own head", kinds.DRAFT: "the draft"}


def kind_of_draft(header: Header) -> str:
    """The speculation that a draft's file is for, by its architecture: the readers' have names of their own."""
    name = header.architecture.lower()
    if any(tensor.name == kinds.MARKOV_HEAD for tensor in header.tensors):
        return kinds.DSPARK
    return next((kind for kind in kinds.READERS if kind in name), kinds.DRAFT)


def _reads_longer(instance: Instance, plan: Plan) -> bool:
    """Does the workload take longer to read than to write, by what is predicted of the plan?"""
    work, told = Workload.of(instance, plan.context_tokens), plan.predicted
    writing = work.reply_tokens / told.decode_tokens_per_s if told.decode_tokens_per_s else 0.0
    return told.prefill_tokens_per_s > 0 and work.prompt_tokens / told.prefill_tokens_per_s > writing


def _orders(instance: Instance, plan: Plan) -> Iterator[Change]:
    """Weights as they are in the file. Those in pinned memory are that anyway."""
    if instance.repack is None and may_repack(plan.placement, plan.backend):
        yield Change("weights as they are in the file", "order of weights", {"repack": False})


def _threads(instance: Instance, plan: Plan, cpu: Cpu) -> Iterator[Change]:
    """All physical cores, the performance cores, with hyper-threading, and half of the cores: a memory may be as fast
    with fewer. No more than the CPUs that the operator named."""
    if instance.threads is not None:
        return
    logical = usable_cpus(cpu, instance)
    physical = min(cpu.physical_cores, logical)
    counts = dict.fromkeys((physical, logical, max(1, physical // 2)))
    for count in counts:
        if count != plan.threads:
            yield Change(f"{count} thread{'s' if count > 1 else ''}", "threads", {"threads": count})
    if logical > plan.threads:
        yield Change(f"{logical} threads for prompts", "threads for prompts", {"threads_batch": logical})
    if plan.cpus and not instance.cpus:
        everywhere = f"0-{logical - 1}"
        yield Change("all CPUs", "threads", {"threads": logical, "cpus": everywhere})


def _spilled(plan: Plan) -> Iterator[Change]:
    """A layer more and some layers more in RAM, and one less: whole layers in place of parts."""
    own = len(plan.placement.spilled)
    for count in dict.fromkeys((own + 1, own + 2, own + max(3, own // 4), max(0, own - 1))):
        yield Change(f"{count} layers spilled", "spilled layers", {"spilled_layers": count})


def _ubatches(instance: Instance, plan: Plan) -> Iterator[Change]:
    """The default, half and double of the plan's."""
    sizes = (DEFAULT_UBATCH, plan.ubatch_tokens * 2, plan.ubatch_tokens // 2)
    for size in dict.fromkeys(size for size in sizes if LEAST_UBATCH <= size <= MOST_UBATCH):
        if size != plan.ubatch_tokens and (instance.batch_tokens is None or size <= instance.batch_tokens):
            yield Change(f"ubatch {size}", "ubatch", {"ubatch_tokens": size})
