"""What llama-server reads beside its command line: variables, and the host's and a user's presets. None of it may reach
a server of ours, whose every flag is planned.

Contract: a module of verify.py and survey.py, and of the operator's side, which writes the units. The names are those
of b11434 (`set_env` in common/arg.cpp; `getenv` in common/common.cpp, tools/server/*.cpp and ggml/src). Python 3.8,
standard library; common.py beside it.

Decision 3: docs/decisions/0003-flags-are-static.md.
"""

from __future__ import annotations

import os
from typing import Dict, List

# Presets: common/arg.cpp, common_params_apply_system_config. No folder can be in XDG_CONFIG_HOME.
FOLDER, CONFIG = "/etc/llama.cpp", "llama.cpp/config.ini"
NO_CONFIG = "/dev/null"
# Of LLAMA_ARG_...; a flag that can be negated has a second name with NO_ (common_arg::get_value_from_env).
FLAGS = """
AGENT ALIAS API_KEY_FILE API_PREFIX BACKEND_SAMPLING BATCH CACHE_IDLE_SLOTS CACHE_PROMPT CACHE_RAM CACHE_REUSE
CACHE_TYPE_K CACHE_TYPE_V CHAT_TEMPLATE CHAT_TEMPLATE_FILE CHAT_TEMPLATE_KWARGS CHECKPOINT_MIN_SPACING_NT
CONTEXT_SHIFT CONT_BATCHING CORS_CREDENTIALS CORS_HEADERS CORS_METHODS CORS_ORIGINS CPU_MOE CTX_CHECKPOINTS CTX_SIZE
DEFRAG_THOLD DEVICE DOCKER_REPO DRAFT_MAX DRAFT_MIN EMBEDDINGS ENDPOINT_METRICS ENDPOINT_PROPS ENDPOINT_SLOTS FIT
FIT_CTX FIT_ESTIMATE FIT_TARGET FLASH_ATTN FREQUENCY_PENALTY GRP_ATTN_N GRP_ATTN_W HF_FILE HF_REPO HOST
IMAGE_MAX_TOKENS IMAGE_MIN_TOKENS JINJA KV_OFFLOAD KV_UNIFIED KV_UNIFIED_PER_SLOT LAZY_MODE LOAD_MODE LOG_COLORS
LOG_FILE LOG_JSONL LOG_PREFIX LOG_TIMESTAMPS LOG_VERBOSITY MAIN_GPU MCP_SERVERS_CONFIG MCP_SERVERS_JSON MIN_P MMPROJ
MMPROJ_AUTO MMPROJ_OFFLOAD MMPROJ_URL MODEL MODELS_AUTOLOAD MODELS_DIR MODELS_MAX MODELS_PRESET MODEL_URL
MTMD_BATCH_MAX_TOKENS NO_AGENT NO_CACHE_IDLE_SLOTS NO_CACHE_PROMPT NO_CONTEXT_SHIFT NO_CONT_BATCHING
NO_CORS_CREDENTIALS NO_ENDPOINT_SLOTS NO_HOST NO_JINJA NO_KV_OFFLOAD NO_KV_UNIFIED NO_LOG_JSONL NO_LOG_PREFIX
NO_LOG_TIMESTAMPS NO_MMPROJ_AUTO NO_MMPROJ_OFFLOAD NO_MODELS_AUTOLOAD NO_PERF NO_PREFILL_ASSISTANT
NO_REASONING_PRESERVE NO_REPACK NO_SHOW_TIMINGS NO_SKIP_CHAT_PARSING NO_SPEC_DRAFT_BACKEND_SAMPLING NO_UI
NO_UI_MCP_PROXY NUMA N_CPU_FFN N_CPU_MOE N_GPU_LAYERS N_GPU_LAYERS_DRAFT N_PARALLEL N_PREDICT OFFLINE
OVERRIDE_TENSOR PERF POOLING PORT PREFILL_ASSISTANT PRESENCE_PENALTY REASONING REASONING_EFFORT REASONING_PRESERVE
REPACK REPEAT_PENALTY RERANKING REUSE_PORT ROPE_FREQ_BASE ROPE_FREQ_SCALE ROPE_SCALE ROPE_SCALING_TYPE RPC
SHOW_TIMINGS SKIP_CHAT_PARSING SPEC_DRAFT_BACKEND_SAMPLING SPEC_DRAFT_CACHE_TYPE_K SPEC_DRAFT_CACHE_TYPE_V
SPEC_DRAFT_CPU_MOE SPEC_DRAFT_HF_REPO SPEC_DRAFT_MODEL SPEC_DRAFT_N_CPU_MOE SPEC_DRAFT_N_MAX SPEC_DRAFT_N_MIN
SPEC_DRAFT_P_MIN SPEC_DRAFT_P_SPLIT SPEC_DRAFT_SAMPLING SPEC_SYNTH_LEN SPEC_SYNTH_RATES SPEC_TYPE SPLIT_MODE
SSE_PING_INTERVAL SSL_CERT_FILE SSL_KEY_FILE STATIC_PATH SWA_FULL TAGS TEMPERATURE TENSOR_SPLIT THINK THINK_BUDGET
THINK_BUDGET_MESSAGE THREADS THREADS_HTTP TIMEOUT TOOLS TOOLS_RUNTIME TOP_K TOP_P UBATCH UI UI_CONFIG UI_CONFIG_FILE
UI_MCP_PROXY VIDEO_FFMPEG_DIR VIDEO_FPS VIDEO_TIMESTAMP_INTERVAL YARN_ATTN_FACTOR YARN_BETA_FAST YARN_BETA_SLOW
YARN_EXT_FACTOR YARN_ORIG_CTX
"""
OTHERS = (
    "AIP_HEALTH_ROUTE", "AIP_HTTP_PORT", "AIP_MODE", "AIP_PREDICT_ROUTE", "GGML_BACKEND_PATH", "HF_TOKEN",
    "LLAMA_API_KEY", "LLAMA_APP_CMD", "LLAMA_CACHE", "LLAMA_SERVER_CHILD_MODE", "LLAMA_SERVER_ROUTER_PORT",
    "LLAMA_SERVER_SLOTS_DEBUG", "MTMD_BACKEND_DEVICE",
)  # fmt: skip
VARIABLES = (*(f"LLAMA_ARG_{name}" for name in FLAGS.split()), *OTHERS)
# Directives of a unit. They count at its next start alone, since a server that runs has read its presets.
DIRECTIVES = (
    f"Environment=XDG_CONFIG_HOME={NO_CONFIG}",
    f"UnsetEnvironment={' '.join(VARIABLES)}",
    f"InaccessiblePaths=-{FOLDER}",
)


def of_process(pid: int) -> List[str]:
    """What a running server may have taken over: names of variables, and paths of presets that it sees. Nothing where
    there is no such process."""
    root, environment = f"/proc/{pid}/root", variables(pid)
    home = environment.get("XDG_CONFIG_HOME") or f"{environment.get('HOME', '/nonexistent')}/.config"
    presets = [path for path in (f"{FOLDER}/config.ini", f"{home}/{CONFIG}") if os.path.exists(root + path)]
    return [*(name for name in VARIABLES if name in environment), *presets]


def variables(pid: int) -> Dict[str, str]:
    """The environment that a process was started with; empty where it cannot be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return {}
    pairs = (word.decode("utf-8", "replace").partition("=") for word in words)
    return {name: value for name, mark, value in pairs if mark}
