"""Numbers of llama.cpp that this project repeats, each with the place in llama.cpp's source where it is read.

Some are sets of words, such as the types of a KV cache. One row of `CONSTANTS` each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.adopting.change import Change
from llamafleet.build.release import DEFAULT_FA_TYPES
from llamafleet.host.card_words import GPU_LIMIT
from llamafleet.memory import context, weights
from llamafleet.memory import flash_attention as fa
from llamafleet.memory.graph import allocation, mla, moe, qwen4exp
from llamafleet.model import gguf, header_checks
from llamafleet.model.architectures import ARCHITECTURES
from llamafleet.model.ggml_types import GGML_TYPES
from llamafleet.planner import estimate, situation
from llamafleet.settings.kinds import KV_TYPES

Read = Callable[[str], str]  # a file of the tree, "" if it is not there


@dataclass(frozen=True)
class Constant:
    """A value, or several as words, here; and where llama.cpp has it."""

    place: str  # here: file, and the name in it
    value: str
    file: str  # there
    pattern: str  # each match in the file is a word; two groups of a match become NAME=VALUE
    within: str = "(?s)(.*)"  # the part of the file that is searched: the first group

    @property
    def words(self) -> frozenset[str]:
        """The value here; neither order nor case matter."""
        return frozenset(self.value.lower().split())

    def read(self, text: str) -> frozenset[str]:
        """The value in the text of `file`; empty if it is not found there."""
        part = re.search(self.within, text)
        matches = re.finditer(self.pattern, part[1], re.MULTILINE) if part else ()
        return frozenset("=".join(match.groups()).lower() for match in matches)


CONSTANTS = (
    Constant("llamafleet/memory/context.py, DEFAULT_BATCH_TOKENS", str(context.DEFAULT_BATCH_TOKENS),
             "common/common.h", r"int32_t n_batch\s*=\s*(\d+);"),
    Constant("inventory/group_data/all.py, ubatch_tokens (llama.cpp's default, in the comment)", "512",
             "common/common.h", r"int32_t n_ubatch\s*=\s*(\d+);"),
    Constant("inventory/group_data/all.py, prompt_cache_mib (llama.cpp's default, in the comment)", "8192",
             "common/common.h", r"int32_t cache_ram_mib\s*=\s*(\d+);"),
    Constant("llamafleet/planner/situation.py, MOST_CHECKPOINTS", str(situation.MOST_CHECKPOINTS),
             "common/common.h", r"int32_t n_ctx_checkpoints\s*=\s*(\d+);"),
    Constant("llamafleet/memory/context.py, PAD_CELLS (of a slot)", str(context.PAD_CELLS),
             "src/llama-context.cpp", r"cparams\.n_ctx(?:_seq)?\s*=\s*GGML_PAD\(cparams\.n_ctx(?:_seq)?, (\d+)\)"),
    Constant("llamafleet/memory/context.py, PAD_CELLS (of a sliding window)", str(context.PAD_CELLS),
             "src/llama-kv-cache-iswa.cpp", r"size_swa = GGML_PAD\(.*, (\d+)\);"),
    Constant("llamafleet/model/architectures.py, cache_layers of gemma3n", str(ARCHITECTURES["gemma3n"].cache_layers),
             "src/models/gemma3n.cpp", r"n_layer_kv_from_start\s*=\s*(\d+);"),
    Constant("llamafleet/model/architectures.py, indexer_shared_from of glm-dsa",
             str(ARCHITECTURES["glm-dsa"].indexer_shared_from),
             "src/models/glm-dsa.cpp", r"n_ctx_train < (\d+);"),
    Constant("llamafleet/model/architectures.py, sparse_layers of gemma3n", str(ARCHITECTURES["gemma3n"].sparse_layers),
             "src/models/models.h", r"n_layer_sparsity\s*=\s*(\d+);"),
    Constant("llamafleet/memory/graph/moe.py, SIGMOID", str(moe.SIGMOID),
             "src/llama-hparams.h", r"LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID\s*=\s*(\d+)"),
    Constant("llamafleet/model/header_checks.py, LAYER_LIMIT", str(header_checks.LAYER_LIMIT),
             "src/llama-hparams.h", r"#define LLAMA_MAX_LAYERS\s+(\d+)"),
    Constant("llamafleet/model/header_checks.py, EXPERT_LIMIT", str(header_checks.EXPERT_LIMIT),
             "src/llama-hparams.h", r"#define LLAMA_MAX_EXPERTS\s+(\d+)"),
    Constant("llamafleet/model/gguf.py, DIMENSIONS", str(gguf.DIMENSIONS),
             "ggml/include/ggml.h", r"#define GGML_MAX_DIMS\s+(\d+)"),
    Constant("llamafleet/model/gguf.py, TENSOR_NAME_LIMIT_BYTES and its zero", str(gguf.TENSOR_NAME_LIMIT_BYTES + 1),
             "ggml/include/ggml.h", r"define GGML_MAX_NAME\s+(\d+)"),
    Constant("llamafleet/model/gguf.py, DEFAULT_ALIGNMENT", str(gguf.DEFAULT_ALIGNMENT),
             "ggml/include/gguf.h", r"#define GGUF_DEFAULT_ALIGNMENT\s+(\d+)"),
    Constant("llamafleet/model/gguf.py, the versions that are read", "3",
             "ggml/include/gguf.h", r"#define GGUF_VERSION\s+(\d+)"),
    Constant("llamafleet/memory/graph/allocation.py, COPIES", str(allocation.COPIES),
             "ggml/CMakeLists.txt", r'GGML_SCHED_MAX_COPIES\s+"(\d+)"'),
    Constant("llamafleet/planner/estimate.py, PIPELINE_COPIES", str(estimate.PIPELINE_COPIES),
             "ggml/CMakeLists.txt", r'GGML_SCHED_MAX_COPIES\s+"(\d+)"'),
    Constant("llamafleet/memory/graph/allocation.py, OFFLOAD_TOKENS", str(allocation.OFFLOAD_TOKENS),
             "ggml/src/ggml-cuda/ggml-cuda.cu", r"min_batch_size\s*=.*GGML_OP_OFFLOAD_MIN_BATCH.*:\s*(\d+);"),
    Constant("llamafleet/memory/graph/allocation.py, OFFLOAD_TOKENS (Vulkan)", str(allocation.OFFLOAD_TOKENS),
             "ggml/src/ggml-vulkan/ggml-vulkan.cpp", r"min_batch_size\s*=.*GGML_OP_OFFLOAD_MIN_BATCH.*:\s*(\d+);"),
    Constant("llamafleet/memory/graph/allocation.py, ALIGNMENT", str(allocation.ALIGNMENT),
             "ggml/src/ggml-cuda/ggml-cuda.cu", r"buffer_type_get_alignment\([^)]*\)\s*\{\s*return (\d+);"),
    Constant("llamafleet/memory/weights.py, _ALIGNMENT_BYTES", "32",
             "ggml/src/ggml-impl.h", r"#define TENSOR_ALIGNMENT\s+(\d+)"),
    Constant("llamafleet/host/card_words.py, GPU_LIMIT", str(GPU_LIMIT),
             "ggml/include/ggml-cuda.h", r"#define GGML_CUDA_MAX_DEVICES\s+(\d+)"),
    Constant("llamafleet/build/release.py, DEFAULT_FA_TYPES", " ".join(f"{name}-{name}" for name in DEFAULT_FA_TYPES),
             "ggml/CMakeLists.txt", r"(\w+-\w+)", within=r'GGML_CUDA_FA_QUANTS\s+"([^"]*)"'),
    Constant("llamafleet/memory/flash_attention.py, SAME_SIZES and RATIO_DECIDES",
             " ".join(map(str, (*fa.SAME_SIZES, *fa.RATIO_DECIDES))),
             "ggml/src/ggml-cuda/fattn.cu", r"case\s+(\d+):",
             within=r"(?s)ggml_cuda_get_best_fattn_kernel.*?switch \(K->ne\[0\]\) \{(.*?)default:"),
    Constant("llamafleet/memory/flash_attention.py, _cuda (heads that share one of K)", "8 32",
             "ggml/src/ggml-cuda/fattn.cu", r"gqa_ratio % (\d+) != 0",
             within=r"(?s)ggml_cuda_get_best_fattn_kernel.*?switch \(K->ne\[0\]\) \{(.*?)default:"),
    Constant("llamafleet/memory/flash_attention.py, TYPES (CUDA)", " ".join(fa.TYPES["cuda"]),
             "ggml/src/ggml-cuda/fattn.cu", r"case GGML_TYPE_(\w+):",
             within=r"(?s)ggml_cuda_fattn_kv_type_supported\(const(.*?)default:"),
    Constant("llamafleet/memory/flash_attention.py, TYPES (Vulkan)", " ".join(fa.TYPES["vulkan"]),
             "ggml/src/ggml-vulkan/ggml-vulkan.cpp", r"case GGML_TYPE_(\w+):",
             within=r"(?s)auto fa_kv_ok = (.*?)default:"),
    Constant("llamafleet/memory/flash_attention.py, _sycl", " ".join(map(str, (*fa.SAME_SIZES, 512, 576))),
             "ggml/src/ggml-sycl/fattn.cpp", r"case\s+(\d+):",
             within=r"(?s)ggml_sycl_get_best_fattn_kernel.*?switch \(K->ne\[0\]\) \{(.*?)default:"),
    Constant("llamafleet/memory/weights.py, MAPPED_ABOVE_BYTES (GiB)", str(weights.MAPPED_ABOVE_BYTES // 1024**3),
             "src/llama-model-loader.cpp", r"auto_min_size = (\d+)ull \* 1024 \* 1024 \* 1024"),
    Constant("llamafleet/memory/graph/qwen4exp.py, POOL_PADDING", str(qwen4exp.POOL_PADDING),
             "src/llama-memory-hybrid-idx.cpp", r"GGML_PAD\(n_pool \+ 1, (\d+)u\)"),
    Constant("llamafleet/settings/kinds.py, KV_TYPES", " ".join(KV_TYPES),
             "common/arg.cpp", r"GGML_TYPE_(\w+)", within=r"(?s)kv_cache_types = \{(.*?)\};"),
    Constant("llamafleet/model/ggml_types.py, GGML_TYPES",
             " ".join(f"{name}={number}" for number, (name, *_) in GGML_TYPES.items()),
             "ggml/include/ggml.h", r"^\s*GGML_TYPE_(?!COUNT)(\w+)\s*=\s*(\d+)",
             within=r"(?s)enum ggml_type \{(.*?)\};"),
    Constant("llamafleet/memory/graph/mla.py, INDEXER_SIZE", str(mla.INDEXER_SIZE),
             "ggml/src/ggml-cuda/lightning-indexer.cu", r"neq0 != (\d+)"),
    Constant("llamafleet/memory/graph/mla.py, INDEXER_HEADS", " ".join(map(str, mla.INDEXER_HEADS)),
             "ggml/src/ggml-cuda/lightning-indexer.cu", r"neq1 != (\d+)"),
)  # fmt: skip


def changes(read: Read, constants: tuple[Constant, ...] = CONSTANTS) -> Iterator[Change]:
    """The values that differ from ours, and those that are no longer where they were."""
    for constant in constants:
        ours, theirs = constant.words, constant.read(read(constant.file))
        if ours != theirs:
            here = " ".join(sorted(ours - theirs)) or "none of these"
            there = " ".join(sorted(theirs - ours)) or ("not there" if theirs else "not found")
            yield Change(constant.place, here, f"{there} ({constant.file})", constant.place.split(",")[0])
