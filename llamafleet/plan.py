"""Which settings a host can carry: machine, models and settings in, a plan or a refusal out.

Everything here is a pure function: the same inputs give the same plan. Capacity is total memory
less what other processes hold on the GPUs; for RAM it is the total less the reserve, not what
happens to be available now, so that our own running server cannot shrink the second plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from . import vulkan
from .adjust import NO_ADJUSTMENT, Adjustment
from .advice import suggestions
from .gguf import Header
from .kv import Context, is_known, number
from .ledger import HOST, MIB, TRAITS, LedgerRow, Model, Placement
from .machine import Gpu, Machine
from .place import Case, Room, choose
from .planned import planned
from .predict import Prediction, predict
from .settings import Instance, Settings

SCHEMA = 1
CELLS = 256  # of a KV cache, which llama.cpp pads to this
DEFAULT_CONTEXT_LIMIT = 32768  # tokens, where the operator names no context (inventory/group_data/all.py)
BACKEND_OF_VENDOR = {"nvidia": "cuda", "amd": "hip"}


@dataclass(frozen=True)
class Refusal:
    """Why a model is not served, what was missing and what would help."""

    reason: str
    device: str = HOST
    needed_bytes: int = 0
    available_bytes: int = 0
    suggestions: tuple[str, ...] = ()
    ledger: tuple[LedgerRow, ...] = ()
    why: tuple[str, ...] = ()
    instance: str = ""

    fits = False

    def to_json(self) -> dict[str, Any]:
        """The plan contract, schema 1."""
        refusal = {
            "reason": self.reason,
            "device": self.device,
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "suggestions": list(self.suggestions),
        }
        return _contract(self, refusal)


@dataclass(frozen=True)
class Plan:
    """How one instance is served on one host."""

    instance: str
    backend: str
    gpus: tuple[Gpu, ...]  # those in use, in bus order; llama.cpp's device N is the N-th of them
    context_tokens: int  # of one slot
    slots: int
    kv_type: str
    ubatch_tokens: int
    threads: int
    prompt_cache_mib: int
    placement: Placement  # device numbers are positions in `gpus`
    is_moe: bool
    ledger: tuple[LedgerRow, ...]
    predicted: Prediction
    why: tuple[str, ...]
    model_bytes: int
    host_bytes: int  # RAM that the process needs, for MemoryMax
    environment: Mapping[str, str] = field(default_factory=dict)

    fits = True

    @property
    def argv(self) -> tuple[str, ...]:
        """The planned part of the command line: context and placement, no path, address or name."""
        return tuple(planned(self))

    @property
    def gpu_bytes(self) -> tuple[tuple[Gpu, int], ...]:
        """Each GPU in use with the bytes planned on it."""
        return tuple(zip(self.gpus, (row.used_bytes for row in self.ledger[:-1]), strict=True))

    def to_json(self) -> dict[str, Any]:
        """The plan contract, schema 1."""
        return _contract(self, None)


def _contract(answer: Plan | Refusal, refusal: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "fits": answer.fits,
        "argv": list(answer.argv) if isinstance(answer, Plan) else [],
        "ledger": [row.to_json() for row in answer.ledger],
        "predicted": (answer.predicted if isinstance(answer, Plan) else Prediction(0.0, 0.0)).to_json(),
        "why": list(answer.why),
        "refusal": refusal,
    }


def resolve_backend(machine: Machine, settings: Settings) -> str | Refusal:
    """The backend to build and plan for; a GPU that is there but unusable is never passed over silently."""
    if settings.backend != "auto":
        return settings.backend
    broken = [gpu for gpu in machine.gpus if gpu.problem]
    usable = machine.usable_gpus
    listed = {gpu.pci_bus_id for gpu in machine.gpus}
    lost = [gpu for gpu in machine.pci_gpus if gpu.vendor in BACKEND_OF_VENDOR and gpu.pci_bus_id not in listed]
    if not usable and (broken or lost):
        told = "; ".join(
            [f"GPU{gpu.index} ({gpu.name}): {gpu.problem}" for gpu in broken]
            + [f"{gpu.vendor} GPU at {gpu.pci_bus_id}: no driver lists it" for gpu in lost]
        )
        return Refusal(
            f"{machine.hostname} has a GPU that cannot be used: {told}",
            device=f"GPU{broken[0].index}" if broken else lost[0].pci_bus_id,
            suggestions=(
                "repair the driver (see the probe's problems)",
                'or set backend = "cpu" to do without the GPU',
            ),
        )
    vendors = {gpu.vendor for gpu in usable}
    if len(vendors) > 1:
        return Refusal(
            f"{machine.hostname} has usable GPUs of several vendors ({', '.join(sorted(vendors))})",
            device=f"GPU{usable[0].index}",
            suggestions=('set backend to the one to use: "cuda", "hip" or "vulkan"',),
        )
    return BACKEND_OF_VENDOR.get(next(iter(vendors)), "vulkan") if vendors else "cpu"


def plan_host(
    machine: Machine,
    requests: Sequence[tuple[Instance, Header]],
    settings: Settings,
    adjustments: Mapping[str, Adjustment] = MappingProxyType({}),
) -> tuple[Plan | Refusal, ...]:
    """A plan or refusal for each instance; they share the host in order, the first is placed first.

    `adjustments`, by instance name: what the binary said of earlier plans.
    """
    backend = resolve_backend(machine, settings)
    if isinstance(backend, Refusal):
        return tuple(replace(backend, instance=instance.name) for instance, _ in requests)
    gpus = vulkan.gpus(machine, settings.vulkan_devices) if backend == "vulkan" else _gpus_for(machine, backend)
    if backend != "cpu" and not gpus:
        refusal = Refusal(
            f"backend is {backend!r} but {machine.hostname} has no GPU that it could use",
            suggestions=(*vulkan.advice(machine), 'set backend = "auto" or "cpu"'),
        )
        return tuple(replace(refusal, instance=instance.name) for instance, _ in requests)
    room = Room.of(machine, gpus, settings)
    answers: list[Plan | Refusal] = []
    for instance, header in requests:
        answer = _plan_one(machine, backend, room, instance, header, adjustments.get(instance.name, NO_ADJUSTMENT))
        if isinstance(answer, Plan):
            room = room.without(answer.ledger)
        answers.append(answer)
    return tuple(answers)


def _gpus_for(machine: Machine, backend: str) -> tuple[Gpu, ...]:
    if backend == "cpu":
        return ()
    vendors = {"cuda": {"nvidia"}, "hip": {"amd"}}.get(backend)
    return tuple(gpu for gpu in machine.usable_gpus if vendors is None or gpu.vendor in vendors)


def _plan_one(
    machine: Machine, backend: str, room: Room, instance: Instance, header: Header, adjustment: Adjustment
) -> Plan | Refusal:
    if number(header, "block_count") < 1 or number(header, "embedding_length") < 1:
        reason = f"{header.name} ({header.architecture}) is no language model: its header gives no layers"
        return Refusal(reason, instance=instance.name, suggestions=("name the model's main GGUF file",))
    trained = number(header, "context_length")
    tokens = instance.context_tokens or min(trained or DEFAULT_CONTEXT_LIMIT, DEFAULT_CONTEXT_LIMIT)
    # llama-server gives whole cells of 256 (GGML_PAD of n_ctx_seq, llama-context.cpp): ask for what it gives.
    padded = -(-tokens // CELLS) * CELLS
    tokens = min(padded, max(tokens, trained)) if trained else padded
    if trained and tokens > trained:
        return Refusal(
            f"{instance.name}: {tokens} tokens of context asked, {header.name} was trained for {trained}"
            " and llama-server caps a slot there",
            instance=instance.name,
            suggestions=(f"set context_tokens to {trained} or less",),
        )
    model = Model.of(header)
    answers = []
    for kv_type in instance.kv_types:
        context = Context(tokens, instance.slots, kv_type, instance.ubatch_tokens)
        case = Case(model, context, room, backend, instance.prompt_cache_mib * MIB, adjustment)
        answers.append(_place(machine, instance, case))
        if isinstance(answers[-1], Plan):
            break
    return answers[-1]


def _place(machine: Machine, instance: Instance, case: Case) -> Plan | Refusal:
    placement = choose(case)
    rows = case.rows(placement)
    if any(row.free_bytes < 0 for row in rows):
        return _refuse(machine, instance, case, rows)
    used = placement.devices
    packed = Placement(
        tuple(None if device is None else used.index(device) for device in placement.layer_devices),
        placement.spilled,
    )
    gpus = tuple(case.room.gpus[device] for device in used)
    return Plan(
        instance=instance.name,
        backend=case.backend,
        gpus=gpus,
        context_tokens=case.context.tokens,
        slots=case.context.slots,
        kv_type=case.context.kv_type,
        ubatch_tokens=case.context.ubatch_tokens,
        threads=instance.threads or max(1, machine.cpu.performance_cores or machine.cpu.physical_cores),
        prompt_cache_mib=instance.prompt_cache_mib,
        placement=packed,
        is_moe=case.model.is_moe,
        ledger=rows,
        predicted=predict(case.model, case.context, packed, gpus),
        why=tuple(_why(machine, case, placement, rows)),
        model_bytes=case.model.header.file_bytes_total,
        host_bytes=sum(row.used_bytes for row in (rows if case.room.unified else rows[-1:])),
        environment=_environment(case.backend, gpus),
    )


def _environment(backend: str, gpus: Sequence[Gpu]) -> dict[str, str]:
    """What the unit must set so that llama.cpp's device N is the N-th GPU of the plan."""
    if backend == "cuda":
        uuids = ",".join(gpu.uuid or str(gpu.index) for gpu in gpus)
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": uuids}
    variable = TRAITS[backend].visible_variable
    numbers = [gpu.index if gpu.vulkan_index is None else gpu.vulkan_index for gpu in gpus]
    return {variable: ",".join(map(str, numbers))} if variable else {}


def _why(machine: Machine, case: Case, placement: Placement, rows: Sequence[LedgerRow]) -> Iterator[str]:
    model, context = case.model, case.context
    yield _where(model, placement)
    if placement.spilled:
        what = "experts" if model.is_moe else "feed-forward weights"
        kept = placement.gpu_layers - 1 - len(placement.spilled)
        first, last = min(placement.spilled), max(placement.spilled)
        yield (
            f"{what} of {len(placement.spilled)} layers ({first} to {last}) are on the CPU,"
            f" of {kept} of {model.layers} on GPUs: as many as fit under the reserve"
        )
    yield f"KV cache {context.kv_type}: {context.tokens} tokens for each of {context.slots} slot(s)"
    if not is_known(model.header):
        name = model.header.architecture
        yield f"the attention windows of {name!r} are not known: its KV cache is an upper bound"
    for gpu in machine.gpus:
        if gpu.problem:
            yield f"GPU{gpu.index} ({gpu.name}) is not used: {gpu.problem}"
    planned, available = rows[-1].used_bytes, machine.memory.available_bytes
    if planned > available:
        yield (
            f"warning: {planned // MIB} MiB of RAM are planned, {available // MIB} MiB are available now;"
            " what runs beside, or our own running server, must leave first"
        )
    if case.room.unified:
        yield "GPU and CPU share one memory: what the GPU holds is taken from the host's capacity"


def _where(model: Model, placement: Placement) -> str:
    held = placement.gpu_layers
    if not held:
        return f"no GPU is used: all {model.layers} layers run on the CPU"
    if None in placement.layer_devices:
        return f"{held} of {model.layers + 1} layers (output included) are on GPUs; the first on the CPU"
    return f"the attention and KV cache of all {model.layers} layers and the output are on GPUs"


def _refuse(machine: Machine, instance: Instance, case: Case, rows: tuple[LedgerRow, ...]) -> Refusal:
    worst = min(rows, key=lambda row: row.free_bytes)
    needed, available = worst.used_bytes, max(0, worst.used_bytes + worst.free_bytes)
    ram = "RAM and swap" if case.room.swap_bytes else "RAM"
    where = ram if worst.device == HOST else worst.device
    if case.room.unified:  # one pool: what is missing is missing for both
        needed, where = sum(row.used_bytes for row in rows), "the memory that GPU and CPU share"
        available = max(0, needed + worst.free_bytes)
    tokens, slots = case.context.tokens, case.context.slots
    total = sum(row.used_bytes + row.free_bytes for row in rows)
    return Refusal(
        f"{instance.name}: {case.model.header.name} with {tokens} tokens for each of {slots} slot(s) does not"
        f" fit on {machine.hostname}: {needed // MIB} MiB of {where} needed, {available // MIB} MiB available"
        " under the reserve",
        device=worst.device,
        needed_bytes=needed,
        available_bytes=available,
        suggestions=suggestions(case.model, case.context, instance, available=total),
        ledger=rows,
        instance=instance.name,
    )
