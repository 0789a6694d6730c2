"""Flags of llama-server that an operator may add, and those that open the host.

Every flag is one of common/arg.cpp at b11434. A flag that is not listed here is refused, so that somebody reads what
a new flag of llama.cpp does before hosts run with it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from llamafleet.validation import SHOWN_CHARACTERS, shown

# These change neither memory, nor what the plan decided, nor who gets in. True: a value follows the flag.
SAFE = {
    "--chat-template": True, "--chat-template-kwargs": True, "--jinja": False, "--no-jinja": False,
    "--reasoning": True, "--reasoning-format": True, "--reasoning-effort": True, "--reasoning-budget": True,
    "--reasoning-budget-message": True, "--reasoning-preserve": False, "--no-reasoning-preserve": False,
    "--temp": True, "--top-k": True, "--top-p": True, "--min-p": True, "--typical": True, "--seed": True,
    "--repeat-last-n": True, "--repeat-penalty": True, "--presence-penalty": True, "--frequency-penalty": True,
    "--samplers": True, "--predict": True, "--keep": True, "--special": False, "--no-escape": False,
    "--rope-scaling": True, "--rope-scale": True, "--rope-freq-base": True, "--rope-freq-scale": True,
    "--yarn-orig-ctx": True, "--yarn-ext-factor": True, "--yarn-attn-factor": True,
    "--context-shift": False, "--no-context-shift": False, "--cache-reuse": True, "--no-cache-prompt": False,
    "--slot-prompt-similarity": True, "--sse-ping-interval": True, "--timeout": True, "--threads-http": True,
    "--spm-infill": False, "--tags": True, "--no-warmup": False, "--check-tensors": False, "--poll": True,
    "--log-timestamps": False, "--log-prefix": False,
}  # fmt: skip

# Whether a value follows the flag, and what the flag lets clients do.
DANGEROUS = {
    "--tools": (True, "lets every client read and write files and run programs on the host"),
    "--tools-runtime": (True, "runs the tools' commands in containers or on other machines"),
    "--agent": (False, "switches on all tools and a proxy to other sites"),
    "--mcp-servers-config": (True, "starts programs on the host, and hands them what clients send"),
    "--mcp-servers-json": (True, "starts programs on the host, and hands them what clients send"),
    "--ui-mcp-proxy": (False, "fetches any address for a client, from inside your network"),
    "--props": (False, "lets every client change the server's settings for all others (POST /props)"),
    "--media-path": (True, "lets clients read files of a folder"),
    "--slot-save-path": (True, "lets clients write files, and read other clients' prompts back"),
    "--path": (True, "serves the files of a folder, without a key"),
    "--cors-origins": (True, "lets web pages of these origins use the server with their visitors' access"),
}

# Never accepted: a setting or the plan gives these flags, or they do what must not be done.
OWN_PLACE = {
    "--model": "source", "--alias": "name", "--host": "listen", "--port": "port", "--ctx-size": "context_tokens",
    "--parallel": "slots", "--cache-type-k": "kv_types", "--cache-type-v": "kv_types", "--threads": "threads",
    "--threads-batch": "threads_batch", "--ubatch-size": "ubatch_tokens", "--cache-ram": "prompt_cache_mib",
    "--batch-size": "batch_tokens", "--load-mode": "load_mode", "--no-op-offload": "op_offload",
    "--no-repack": "repack",
    "--ctx-checkpoints": "context_checkpoints_mib", "--kv-unified": "kv_unified", "--no-kv-unified": "kv_unified",
    "--kv-unified-per-slot": "context_tokens", "--split-mode": "split_mode",
    "--chat-template-file": "chat_template_file", "--grammar-file": "grammar_file", "--grammar": "grammar_file",
    "--json-schema-file": "json_schema_file", "--json-schema": "json_schema_file", "--lora": "adapters",
    "--lora-scaled": "adapters", "--mmproj": "projector", "--mmproj-url": "projector",
    "--image-min-tokens": "image_min_tokens", "--image-max-tokens": "image_max_tokens", "--spec-type": "speculation",
    "--spec-default": "speculation",
    "--spec-draft-model": "draft", "--model-draft": "draft", "--spec-draft-hf": "draft",
    "--spec-draft-n-max": "draft_max_tokens", "--spec-draft-n-min": "draft_min_tokens",
    "--spec-ngram-mod-n-max": "draft_max_tokens", "--spec-ngram-mod-n-min": "draft_min_tokens",
    "--spec-draft-type-k": "kv_types", "--spec-draft-type-v": "kv_types", "--spec-draft-threads": "threads",
    "--spec-draft-threads-batch": "threads",
    "--sleep-idle-seconds": "sleep_idle_seconds",
    "--api-key": "api_key_file", "--api-key-file": "api_key_file", "--hf-token": "hub_token_file",
    "--embedding": "serves", "--reranking": "serves", "--pooling": "pooling",
    "--ssl-cert-file": "tls_certificate_file", "--ssl-key-file": "tls_key_file", "--ui": "build_ui",
}  # fmt: skip
PLANNED = {
    "--n-gpu-layers", "--device", "--tensor-split", "--override-tensor", "--cpu-moe", "--n-cpu-moe",
    "--n-cpu-ffn", "--main-gpu", "--fit", "--flash-attn", "--swa-full",
    "--mmproj-device", "--mmproj-offload", "--no-mmproj-offload", "--mtmd-batch-max-tokens", "--no-kv-offload",
    "--spec-draft-ngl", "--spec-draft-device", "--spec-draft-override-tensor", "--spec-draft-cpu-moe",
    "--spec-draft-n-cpu-moe",
}  # fmt: skip
REFUSED = {
    "--verbose": "it would write prompts, and parts of keys, to the journal",
    "--verbosity": "it would write prompts, and parts of keys, to the journal",
    "--log-file": "the journal has the log",
    "--model-url": "the service downloads nothing",
    "--hf-repo": "the service downloads nothing",
    "--rpc": "the build has no RPC backend, which llama.cpp itself calls insecure",
    "--api-prefix": "the gate asks at the root; a proxy in front can have a prefix",
}


def words(flags: Sequence[str]) -> tuple[str, ...]:
    """The flags as llama-server's arguments: "--flag value" becomes two of them."""
    return tuple(word for flag in flags for word in flag.split(" ", 1))


def problems(extra: Sequence[str], dangerous: Sequence[str], has_keys: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with an instance's `extra_flags` and `dangerous_flags`: the setting and a sentence each."""
    for flag in extra:
        name, _, value = flag.partition(" ")
        if name in DANGEROUS:
            yield "extra_flags", f"{name} {DANGEROUS[name][1]}; if that is meant, name it in dangerous_flags"
        elif name not in SAFE:
            yield "extra_flags", _why_not(name)
        else:
            yield from (("extra_flags", problem) for problem in _wrong_value(name, value, SAFE[name]))
    for flag in dangerous:
        name, _, value = flag.partition(" ")
        if name not in DANGEROUS:
            yield "dangerous_flags", f"should be of {', '.join(sorted(DANGEROUS))}, is {shown(name)}"
        elif not has_keys:
            yield "dangerous_flags", f"{name} {DANGEROUS[name][1]}: give an api_key_file too"
        else:
            yield from (("dangerous_flags", problem) for problem in _wrong_value(name, value, DANGEROUS[name][0]))


def _why_not(name: str) -> str:
    if name in OWN_PLACE:
        return f"{name} is given by the setting {OWN_PLACE[name]}"
    if name in PLANNED:
        return f"{name} is decided by the plan; see docs/planning.md"
    if name in REFUSED:
        return f"{name} is refused: {REFUSED[name]}"
    # Without the dashes, which all share: "--foo" is no "--tools".
    known = {flag.lstrip("-"): flag for flag in (*SAFE, *DANGEROUS)}
    near = [known[one] for one in difflib.get_close_matches(name[:SHOWN_CHARACTERS].lstrip("-"), known, n=1)]
    hint = f"did you mean {near[0]}?" if near else "llamafleet/settings/extra_flags.py has those that are"
    return f"{shown(name)} is not among the flags known to be safe; {hint}"


def _wrong_value(name: str, value: str, takes_value: bool) -> Iterator[str]:
    if takes_value and not value:
        yield f"{name} needs a value behind a blank, as in {name + ' VALUE'!r}"
    if value and not takes_value:
        yield f"{name} takes no value, has {shown(value)}"
    if any(ord(character) < ord(" ") for character in value):
        yield f"{name} should have no control characters, has {shown(value)}"
