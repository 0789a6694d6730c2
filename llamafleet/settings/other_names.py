"""llama.cpp's own words for what settings say: a message names the setting, or says that the plan decides it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def _names() -> Iterator[tuple[str, str]]:
    """llama.cpp's own words (common/arg.cpp) for what a setting here says, with what to write instead."""
    settings = {
        "context_tokens": "n_ctx ctx ctx_size context_size num_ctx context_length max_model_len c",
        "slots": "n_parallel parallel np num_parallel n_slots",
        "kv_types": "cache_type_k cache_type_v ctk ctv cache_type kv_type kv_cache_type type_k type_v",
        "kv_unified": "kvu unified_kv",
        "split_mode": "sm",
        "ubatch_tokens": "n_ubatch ubatch ubatch_size ub",
        "batch_tokens": "batch batch_size n_batch b",
        "threads": "n_threads t num_threads",
        "threads_batch": "tb",
        "cpus": "cpu_range cpu_mask",
        "prompt_cache_mib": "cache_ram cram",
        "context_checkpoints_mib": "ctx_checkpoints swa_checkpoints",
        "serves": "embedding embeddings rerank reranking",
        "pooling": "pooling_type",
        "name": "alias",
        "listen": "host",
        "api_key_file": "api_key",
        "source": "model m hf_repo hf hf_file model_url mu",
    }
    for setting, words in settings.items():
        yield from ((word, f"it is `{setting}` here") for word in words.split())
    decided = (
        "ngl n_gpu_layers gpu_layers n_cpu_moe ncmoe cpu_moe tensor_split ts override_tensor ot fa"
        " flash_attn fit mmap no_mmap mlock"
    )
    yield from ((word, "the plan decides it") for word in decided.split())


LLAMA_CPP_NAMES: Mapping[str, str] = dict(_names())
