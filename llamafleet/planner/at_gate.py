"""The speed that a request is expected to have which is measured: a gate's own, far shorter than a workload's, or that
of a tune's trials.

What is measured (`llamafleet/remote/gate_reply.py`, `llamafleet/remote/tune.py`) is compared with it to learn the
host's rates.
"""

from __future__ import annotations

from collections.abc import Sequence

from llamafleet.host import learned
from llamafleet.host.machine import Gpu
from llamafleet.host.speeds import Rates
from llamafleet.memory.weights import Model
from llamafleet.planner.roofline import Roofline
from llamafleet.planner.search import Candidate
from llamafleet.settings.workload import Workload

# gate_reply.py: PROMPT has 19 to 22 tokens in the vocabularies of Gemma, Llama and Qwen; SPEED_TOKENS are written.
GATE_WORK = Workload(prompt_tokens=20, reply_tokens=32, live_tokens=36, concurrency=1)


def host_cost(model: Model, rates: Rates) -> float:
    """The time that a processor needs for a prompt, as a multiple of that for a model of K-quants of the same size."""
    elements = sum(model.elements.values())
    cost = sum(number * rates.host_kernels.costs.get(kind, 1.0) for kind, number in model.elements.items())
    return cost / elements if elements else 1.0


def expected(roofline: Roofline, candidate: Candidate, gpus: Sequence[Gpu]) -> learned.Expected:
    """The speed of the workload that `roofline` was made for, of all its requests at once, with the rates that it has.
    `gpus`: those in use."""
    rates, order, context, work = roofline.rates, candidate.order, candidate.context, roofline.work
    busy = min(context.slots, work.concurrency)
    decode = busy / roofline.decode(order, candidate.segments, busy, context.kv_type).total
    prompt = work.prompt_tokens / roofline.prefill(order, candidate.segments, context.ubatch_tokens).total
    on_host, partly = candidate.kind == "all", candidate.kind != "none"
    filled = rates.host_kernels.filled(work.prompt_tokens)
    return learned.Expected(
        decode_tokens_per_s=decode,
        prompt_tokens_per_s=prompt * filled if on_host else prompt,
        computed_on=learned.HOST if on_host else learned.BOTH if partly else learned.GPUS,
        host_bytes_per_s=rates.host_bytes_per_s,
        host_flops=rates.host_flops * host_cost(roofline.model, rates),  # of a model whose types cost nothing more
        gpu_bytes_per_s={
            gpu.uuid: rates.gpus[number].bytes_per_s for gpu, number in zip(gpus, order, strict=True) if gpu.uuid
        },
        gpu_flops={
            gpu.uuid: rates.gpus[number].flops
            for gpu, number in zip(gpus, order, strict=True)
            if gpu.uuid and work != GATE_WORK
        },
    )
