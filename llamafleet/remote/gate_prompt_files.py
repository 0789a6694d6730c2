"""Does the server use the operator's chat template, grammar or JSON schema?

Part of gate.py and under its contract: Python 3.8, standard library. plan.json's `gate.prompt_files` has by the name of
each credential {"sha256": of the file, "served_sha256": of the text that the server tells}.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Optional

from common import CHAT_TEMPLATE, GRAMMAR, JSON_SCHEMA, sha256
from gate_server import ask, first_key, found_status, result

# llama.cpp replaces a condition of two published templates by this one (common_chat_templates_init), which are then
# no longer the file's bytes.
PATCHED = "{%- if false %}"
NAME = "prompt files"
TOKENS = 4
SECONDS = 300.0
# A grammar that waits for what no reply has: neither a text before it nor behind it. So the model answers freely, and
# the other checks hold under any grammar.
FREE = {"grammar_lazy": True, "grammar_triggers": [{"type": 2, "value": "[^\\s\\S]"}]}


def free(spec: Dict[str, Any]) -> Dict[str, Any]:
    """What a request says so that the server's own grammar does not constrain the reply; empty where it has none."""
    return FREE if constrains(spec) else {}


def constrains(spec: Dict[str, Any]) -> bool:
    return not {GRAMMAR, JSON_SCHEMA}.isdisjoint(spec.get("prompt_files", {}))


def check_prompt_files(spec: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The template must be the file's and make a prompt, the grammar must be one that llama-server can follow."""
    files = spec.get("prompt_files", {})
    problem = bad_template(spec, files[CHAT_TEMPLATE]["served_sha256"]) if CHAT_TEMPLATE in files else None
    if problem is None and constrains(spec):
        problem = bad_grammar(spec, files[GRAMMAR]["served_sha256"] if GRAMMAR in files else None)
    if not files or problem:
        return problem
    names = " and ".join(name.replace("-", " ") for name in sorted(files))
    return result(NAME, True, f"the {names} of the plan", "in use")


def bad_template(spec: Dict[str, Any], digest: str) -> Optional[Dict[str, Any]]:
    status, props = ask(spec["url"], "/props", first_key(spec))
    told = props.get("chat_template") if isinstance(props, dict) else None
    if not isinstance(told, str) or (sha256(told.encode()) != digest and PATCHED not in told):
        return result(
            NAME, False, f"the template of chat_template_file, SHA-256 {digest[:12]}...",
            f"{told[:60]!r}..." if isinstance(told, str) else found_status(status, props),
            "the file was changed: deploy again",
        )  # fmt: skip
    body = {"messages": [{"role": "user", "content": "a"}]}
    status, made = ask(spec["url"], "/apply-template", first_key(spec), body)
    prompt = made.get("prompt") if isinstance(made, dict) else None
    if status != 200 or not isinstance(prompt, str) or not prompt:
        return result(NAME, False, "a prompt of one message of a user", found_status(status, made),
                      "chat_template_file is no template that llama-server can apply")  # fmt: skip
    return None


def bad_grammar(spec: Dict[str, Any], digest: Optional[str]) -> Optional[Dict[str, Any]]:
    """Why a reply under the server's own grammar is none; `digest` is that of a grammar file, not of a JSON schema."""
    body = {"prompt": "a", "n_predict": TOKENS, "temperature": 0, "cache_prompt": False}
    status, answer = ask(spec["url"], "/completion", first_key(spec), body, SECONDS)
    found = answer if isinstance(answer, dict) else {}
    settings = found.get("generation_settings")
    grammar = settings.get("grammar") if isinstance(settings, dict) else None
    if status != 200 or not isinstance(grammar, str) or not grammar:
        return result(NAME, False, "a reply under the grammar of the plan", found_status(status, answer),
                      "llama-server cannot follow grammar_file or json_schema_file")  # fmt: skip
    if digest is not None and sha256(grammar.encode()) != digest:
        return result(NAME, False, f"the grammar of grammar_file, SHA-256 {digest[:12]}...",
                      json.dumps(grammar[:60]), "the file was changed: deploy again")  # fmt: skip
    return None
