"""Does the server answer as a healthy model does, and as fast as it should?

Part of gate.py and under its contract: Python 3.8, standard library. The checks hold for any model, also for an
untrained one: none looks at the meaning of the words.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from typing import Any, Callable, Tuple  # the contract is Python 3.8, whose own are typing's

from gate_prompt_files import free
from gate_server import ask, first_key, result, slots

PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is"
OTHER_PROMPT = "One, two, three, four, five, six, seven,"
TOKENS, SPEED_TOKENS = 12, 32
TOP = 5  # candidates in the answer for each token
SECONDS = 300.0  # for one request
# A busy server computes requests together, which may tip a close decision: two answers of so many must agree.
TRIES = 4
# Nats by which the same token's log-probability may differ when it is computed by another way (a batch in place
# of single tokens) or by another release: kernels round differently, by hundredths; garbage is off by several.
TOLERANCE_NATS = 2.0
# Of the predicted speed, which no measurement backs: far below the worst error of the prediction. Above
# PREDICTED_LIMIT tokens/s a token costs more in overheads than in what is predicted.
PREDICTED_SHARE, PREDICTED_LIMIT = 0.05, 100.0
# Speeds that are remembered; the floor is a share of their median, so that one lucky figure does not set it.
REMEMBERED = 5
# At least so many tries where they are quick, so that the figure to remember is not a chance one; at most so many.
QUICK_TRIES, QUICK_SECONDS = 3, 5.0
SPEED_TRIES, SPEED_PAUSE, SPEED_SECONDS = 6, 1.0, 60.0


class Bad(Exception):
    """No healthy model gives this answer. Arguments: expected, found, and the usual cause."""


def complete(
    spec: dict[str, Any], prompt: str | list[int], tokens: int, top: int = TOP, seconds: float = SECONDS, **more: Any
) -> dict[str, Any]:
    """The server's answer with greedy sampling and without its prompt cache. Raises Bad if it has not all tokens.

    `more`: what the request says beside."""
    body = {
        "prompt": prompt, "n_predict": tokens, "temperature": 0, "seed": 1, "ignore_eos": True, "n_probs": top,
        "cache_prompt": False, "return_tokens": True, "repeat_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, **free(spec), **more,
    }  # fmt: skip
    status, answer = ask(spec["url"], "/completion", first_key(spec), body, seconds)
    found = answer if isinstance(answer, dict) else {}
    if status != 200 or found.get("tokens_predicted") != tokens:
        hint = str(answer)[:300] if status != 200 else "it ended early: its context is full, or it stopped by itself"
        raise Bad(
            f"200 and {tokens} tokens", f"{status or 'no answer'}, {found.get('tokens_predicted', 0)} tokens", hint
        )
    return found


def first_of(answer: dict[str, Any]) -> dict[int, float]:
    """Log-probabilities of the candidates for the answer's first token."""
    told: dict[int, float] = {}
    for one in answer["completion_probabilities"][0]["top_logprobs"]:
        told[one["id"]] = one["logprob"]
    return told


def is_untold(spec: dict[str, Any], place: dict[str, Any]) -> bool:
    """Does llama-server tell no likelihoods of this token because it was guessed? gate_speculation.py asks for each
    token alone."""
    return bool(spec.get("speculation")) and not place["top_logprobs"]


def check_numbers(spec: dict[str, Any], answer: dict[str, Any]) -> None:
    """Raise Bad unless every token is among its candidates, whose likelihoods are finite and add up to 1 at most."""
    places = answer.get("completion_probabilities") or []
    if len(places) != TOKENS:
        raise Bad(f"likelihoods of {TOKENS} tokens", len(places), "llama-server's API changed")
    for place in [places[0], *(one for one in places[1:] if not is_untold(spec, one))]:
        likely = [one["logprob"] for one in place["top_logprobs"]]
        sound = [
            value for value in likely if isinstance(value, (int, float)) and math.isfinite(value) and value <= 1e-3
        ]
        total = sum(math.exp(value) for value in sound)
        if len(sound) != len(likely) or not 0 < total <= 1.01 or place["id"] not in first_ids(place):
            raise Bad(
                f"{TOP} likelihoods that add up to 1 at most, the token among them",
                f"{likely} for token {place['id']}",
                "the backend computes garbage (NaN): a broken kernel, driver or GPU, or a damaged model file",
            )  # fmt: skip


def first_ids(place: dict[str, Any]) -> list[int]:
    return [one["id"] for one in place["top_logprobs"]]


def check_prompt(spec: dict[str, Any], answer: dict[str, Any]) -> None:
    """Raise Bad unless the server has read as many prompt tokens as its own tokenizer makes."""
    body = {"content": PROMPT, "add_special": True, "parse_special": True}
    status, told = ask(spec["url"], "/tokenize", first_key(spec), body)
    expected = len(told["tokens"]) if status == 200 and isinstance(told, dict) else f"status {status} of /tokenize"
    if answer.get("tokens_evaluated") != expected:
        raise Bad(f"a prompt of {expected} tokens", answer.get("tokens_evaluated"), "part of the prompt was not read")


def same_twice(spec: dict[str, Any]) -> dict[str, Any]:
    """An answer that the server gave twice. Raises Bad if no two of TRIES answers agree."""
    seen: list[list[int]] = []
    for _ in range(TRIES):
        answer = complete(spec, PROMPT, TOKENS)
        if answer["tokens"] in seen:
            return answer
        seen.append(answer["tokens"])
    raise Bad("the same answer twice at temperature 0", f"{TRIES} different ones: {seen}",
              "the backend computes garbage: a broken kernel, driver or GPU, or failing memory")  # fmt: skip


def check_ways(spec: dict[str, Any], answer: dict[str, Any]) -> None:
    """Raise Bad if a token's likelihood depends on whether its prefix was read in one batch or token by token."""
    half = TOKENS // 2
    place = answer["completion_probabilities"][half]
    if is_untold(spec, place):
        return
    _, told = ask(spec["url"], "/tokenize", first_key(spec),
                  {"content": PROMPT, "add_special": True, "parse_special": True})  # fmt: skip
    found = first_of(complete(spec, [*told["tokens"], *answer["tokens"][:half]], 1))
    compare({one["id"]: one["logprob"] for one in place["top_logprobs"]}, found,
            "reading tokens at once and one by one should give the same likelihoods",
            "the backend computes garbage: kernels for batches and for single tokens disagree")  # fmt: skip


def compare(expected: dict[int, float], found: dict[int, float], what: str, hint: str) -> None:
    """Raise Bad unless the likeliest token of `expected` is about as likely in `found`."""
    best = max(expected, key=lambda token: expected[token])
    if abs(found.get(best, -math.inf) - expected[best]) > TOLERANCE_NATS:
        raise Bad(f"{what}: token {best} at {expected[best]:.2f} nats", f"{found}", hint)


def check_completion(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Of a server that writes: completions must have all their tokens, finite likelihoods and the same text twice,
    depend on the prompt, and agree with the last gate."""
    if spec["serves"] != "chat":
        return None
    try:
        answer = same_twice(spec)
        check_numbers(spec, answer)
        check_prompt(spec, answer)
        check_ways(spec, answer)
        if first_of(complete(spec, OTHER_PROMPT, 1)) == first_of(answer):
            raise Bad("another answer to another prompt", "exactly the same likelihoods",
                      "the prompt is not read: the backend computes garbage")  # fmt: skip
        before = spec["last"].get("first", {})
        if before.get("model") == model_of(spec):
            compare({int(token): value for token, value in before["top"].items()}, first_of(answer),
                    "the same model should answer as at the last gate",
                    "a regression in this llama.cpp, or a damaged model file; if the new answer is the right one: "
                    f"rm {spec['record']}, and deploy again")  # fmt: skip
    except Bad as bad:
        return result("completion", False, *bad.args)
    spec["measured"]["first"] = {"model": model_of(spec), "top": first_of(answer)}
    heard(spec, answer)
    return result("completion", True, f"{TOKENS} tokens, twice the same", f"{TOKENS} tokens, twice the same")


def heard(spec: dict[str, Any], answer: dict[str, Any]) -> None:
    """Remember the best speed at which a prompt was read: the liveness check waits accordingly for a batch."""
    last = spec["last"].get("prompt_tokens_per_s", 0.0) if spec["last"].get("speed_key") == speed_key(spec) else 0.0
    best = max(last, spec["measured"].get("prompt_tokens_per_s", 0.0), answer["timings"]["prompt_per_second"])
    spec["measured"]["prompt_tokens_per_s"] = best


def model_of(spec: dict[str, Any]) -> str:
    """A hash of the model's content."""
    return hashed([[file["path"].rsplit("/", 1)[-1], file["size_bytes"], file["sha256"]] for file in spec["files"]])


def speed_key(spec: dict[str, Any]) -> str:
    """A hash of all that decides the speed except the release: a new release must be as fast as the old one."""
    return hashed([model_of(spec), spec["argv"][1:], [gpu["uuid"] for gpu in spec["gpus"]]])


def hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def floor(spec: dict[str, Any], remembered: str = "speeds") -> tuple[float, str]:
    """The lowest acceptable speed in tokens a second, and how it was calculated. `remembered`: the record's key with
    the speeds of the last gates."""
    percent = spec["speed_floor_percent"]
    before = spec["last"].get(remembered, []) if spec["last"].get("speed_key") == speed_key(spec) else []
    if percent == 0:
        return 0.0, "speed_floor_percent is 0"
    if before:
        usual = statistics.median(before)
        return usual * percent / 100, f"{percent} % of {usual:.1f} at the last gates"
    predicted = min(spec["predicted_tokens_per_s"], PREDICTED_LIMIT)
    return predicted * PREDICTED_SHARE, f"{PREDICTED_SHARE * 100:.0f} % of {predicted:.1f}, a rough prediction"


def load() -> str:
    """What the host does beside the server, for a speed that is too low: its load has the server's own threads, too."""
    try:
        return f", with a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs in the last minute"
    except OSError:
        return ""


def best_of_tries(spec: dict[str, Any], least: float, measure: Callable[[], float]) -> Tuple[float, int]:
    """The best of several measured speeds, and the slots that are busy: then there is none. `measure` may raise Bad."""
    best, began = 0.0, time.monotonic()
    for attempt in range(SPEED_TRIES):
        busy = sum(1 for slot in slots(spec) or [] if slot.get("is_processing"))
        if busy:
            return 0.0, busy
        best, spent = max(best, measure()), time.monotonic() - began
        quick = attempt + 1 < QUICK_TRIES and spent < QUICK_SECONDS
        if spent > SPEED_SECONDS or (best >= least and not quick):
            break
        if not quick:
            time.sleep(SPEED_PAUSE)
    return best, 0


def check_speed(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Of a server that writes: compare the best of several tries with the floor, so that short load on the host does
    not count. A server with busy slots is not measured."""
    if spec["serves"] != "chat":
        return None
    least, why = floor(spec)
    expected = f"at least {least:.1f} tokens/s ({why})"

    def write() -> float:
        answer = complete(spec, PROMPT, SPEED_TOKENS, 0)
        heard(spec, answer)
        speed: float = answer["timings"]["predicted_per_second"]
        return speed

    try:
        best, busy = best_of_tries(spec, least, write)
    except Bad as bad:
        return result("speed", False, *bad.args)
    if busy:
        return result("speed", True, expected, f"not measured: {busy} slots are busy")
    if best < least:
        return result("speed", False, expected, f"{best:.1f} tokens/s{load()}",
                      "a regression in this llama.cpp, other load (look again when the host is idle), throttling or "
                      f"fewer PCIe lanes; to accept it: rm {spec['record']}, and deploy again")  # fmt: skip
    spec["measured"]["decode_tokens_per_s"] = best
    return result("speed", True, expected, f"{best:.1f} tokens/s")
