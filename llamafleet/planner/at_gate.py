"""The speed that a gate's own request is expected to have: far shorter than a workload's, and so another speed.

What the gate measures (`llamafleet/remote/gate_reply.py`) is compared with it to learn the host's rates.
"""

from __future__ import annotations

from collections.abc import Sequence

from llamafleet.host import learned
from llamafleet.host.machine import Gpu
from llamafleet.planner.roofline import Roofline
from llamafleet.planner.search import Candidate
from llamafleet.settings.workload import Workload

# gate_reply.py: PROMPT has 19 to 22 tokens in the vocabularies of Gemma, Llama and Qwen; SPEED_TOKENS are written.
GATE_WORK = Workload(prompt_tokens=20, reply_tokens=32, live_tokens=36, concurrency=1)
# A processor reads a prompt of so many tokens at half the speed of a long one: Gemma 3 270M, Qwen2.5-Coder 0.5B and
# 1.5B read 20 tokens at 0.72, 0.74 and 0.66 of their speed with 128 (two cores with AVX-512, b11434).
HOST_HALF_SPEED_TOKENS = 8


def expected_at_gate(roofline: Roofline, candidate: Candidate, gpus: Sequence[Gpu]) -> learned.Expected:
    """The speed of GATE_WORK, for which `roofline` was made, with the rates that it has. `gpus`: those in use."""
    rates, order, context = roofline.rates, candidate.order, candidate.context
    decode = 1 / roofline.decode(order, candidate.segments, 1, context.kv_type).total
    prompt = GATE_WORK.prompt_tokens / roofline.prefill(order, candidate.segments, context.ubatch_tokens).total
    on_host, partly = candidate.kind == "all", candidate.kind != "none"
    filled = GATE_WORK.prompt_tokens / (GATE_WORK.prompt_tokens + HOST_HALF_SPEED_TOKENS)
    return learned.Expected(
        decode_tokens_per_s=decode,
        prompt_tokens_per_s=prompt * filled if on_host else prompt,
        computed_on=learned.HOST if on_host else learned.BOTH if partly else learned.GPUS,
        host_bytes_per_s=rates.host_bytes_per_s,
        host_flops=rates.host_flops,
        gpu_bytes_per_s={
            gpu.uuid: rates.gpus[number].bytes_per_s for gpu, number in zip(gpus, order, strict=True) if gpu.uuid
        },
    )
