"""Head sizes for which ggml-cuda has flash attention: plans ask for it with every model, and it is left to the CPU
where a GPU has no kernel for the model's heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from bench.adopting.change import Change
from sandbox.layouts import PUBLISHED

FILE = "ggml/src/ggml-cuda/fattn.cu"  # in the tree of llama.cpp; ggml_cuda_get_best_fattn_kernel
LOOK_AT = "llamafleet/memory/graph/allocation.py"
_SWITCH = re.compile(r"switch \(K->ne\[0\]\) \{(.*?)\n\s*default:", re.DOTALL)
_CASE = re.compile(r"case\s+(\d+):")
_INSTANCE = re.compile(r"ggml/src/ggml-cuda/template-instances/fattn-.*dkq(\d+)-dv(\d+)\.cu")


def head_sizes(source: str) -> frozenset[int]:
    """Sizes of a K head in the text of `FILE`."""
    switch = _SWITCH.search(source)
    return frozenset(map(int, _CASE.findall(switch[1]))) if switch else frozenset()


def instances(paths: Iterable[str]) -> frozenset[str]:
    """Pairs of sizes of a K and a V head that have a kernel, by the names of the tree's files: 576/512."""
    return frozenset(f"{match[1]}/{match[2]}" for path in paths if (match := _INSTANCE.fullmatch(path)))


def changes(
    pinned: tuple[frozenset[int], frozenset[str]], theirs: tuple[frozenset[int], frozenset[str]]
) -> Iterator[Change]:
    """Sizes and pairs that are new or gone, with the published layouts that have such heads."""
    if not theirs[0]:
        yield Change("head sizes of flash attention", f"a switch in {FILE}", "not found", "bench/adopting/attention.py")
        return
    for size in sorted(pinned[0] ^ theirs[0]):
        yield _change(f"flash attention of K heads of {size}", size in theirs[0], _layouts(size))
    for pair in sorted(pinned[1] ^ theirs[1]):
        yield _change(f"flash attention's kernel for K/V heads of {pair}", pair in theirs[1], "")


def _change(what: str, is_new: bool, layouts: str) -> Change:
    before, after = ("not there", "new") if is_new else ("there", "gone")
    return Change(what, before, f"{after}{layouts}", LOOK_AT)


def _layouts(size: int) -> str:
    having = [name for name, layout in PUBLISHED.items() if layout.head_dim == size]
    return f" ({', '.join(having)})" if having else ""
