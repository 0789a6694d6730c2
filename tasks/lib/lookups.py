"""What is looked up once a run on the operator's machine: the commit, the models' files and headers."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

from gevent.lock import RLock

from llamafleet import causes, payload
from llamafleet.hub import source
from llamafleet.hub.network import Network
from llamafleet.remote.common import API_KEYS
from llamafleet.settings import prompt_files, secrets
from llamafleet.settings.schema import Instance, Settings
from tasks.lib import certificates

T = TypeVar("T")

# Of the text of a tune's prompts, as much as the host reads (tune.py): more than most contexts hold.
MOST_TUNE_PROMPT = 2**20


class LookupFailed(Exception):
    """A commit or model cannot be looked up; the text names it, why, and the way out."""


_known: dict[Hashable, Any] = {}
_locks: dict[Hashable, RLock] = {}


def once(key: Hashable, look_up: Callable[[], T]) -> T:
    """The result of the first call with this key; hosts that ask meanwhile wait for it.

    A failure is remembered too: fifty hosts do not ask fifty times for what is not there.
    """
    with _locks.setdefault(key, RLock()):
        if key not in _known:
            try:
                _known[key] = look_up()
            except Exception as error:
                _known[key] = error
    if isinstance(_known[key], Exception):
        raise _known[key]
    result: T = _known[key]
    return result


def forget_failures() -> None:
    """Let what could not be looked up be tried again."""
    for key in [key for key, value in _known.items() if isinstance(value, Exception)]:
        del _known[key]


def commit(settings: Settings) -> str:
    """The 40-digit commit that the settings' ref names, resolved once for all hosts."""
    repository, ref = settings.llama_cpp_repository, settings.llama_cpp_ref
    if re.fullmatch(r"[0-9a-f]{40}", ref):
        return ref
    way = network(settings)
    return once(("commit", repository, ref, way), lambda: _ls_remote(repository, ref, way))


def helpers_key() -> str:
    """The name of our helpers on hosts, see `payload.helpers_key`: made of a hundred files, and the same for all."""
    return once("the key of the helpers", payload.helpers_key)


def network(settings: Settings) -> Network:
    """The way out that the settings name, for this machine and for the host's jobs."""
    return Network(settings.proxy, settings.no_proxy, settings.ca_file)


def _ls_remote(repository: str, ref: str, way: Network) -> str:
    refs = [f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}", f"refs/heads/{ref}"]
    try:
        done = subprocess.run(
            ["git", "ls-remote", repository, *refs],
            capture_output=True, text=True, timeout=60, check=True,
            env={**way.environment(), "GIT_TERMINAL_PROMPT": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        answer = getattr(error, "stderr", None) or error
        said = causes.of_local(str(answer).strip())
        raise LookupFailed(f"llama_cpp_repository: cannot ask {repository}: {said}") from error
    commits = {name: sha for sha, name in re.findall(r"^([0-9a-f]{40})\t(\S+)$", done.stdout, re.MULTILINE)}
    for name in refs:
        if name in commits:
            return commits[name]
    raise LookupFailed(
        f"llama_cpp_ref: {repository} has no tag or branch {ref!r}; "
        "a commit must be given with all 40 hexadecimal digits"
    )


def model(instance: Instance, settings: Settings) -> source.ModelFiles:
    """Files and header of an instance's model, read once for all hosts that serve it."""
    key = ("model", instance.source, instance.mirrors, instance.sha256, settings.hub_endpoint, network(settings))
    return once(key, lambda: _read_model(instance, settings))


def _read_model(instance: Instance, settings: Settings) -> source.ModelFiles:
    token, way = secrets.hub_token(settings.hub_token_file, settings.hub_endpoint), network(settings)
    return source.read_model(
        instance.source, endpoint=settings.hub_endpoint, token=token,
        mirrors=instance.mirrors, sha256=instance.sha256 or (), network=way,
    )  # fmt: skip


def projector(of: str, settings: Settings) -> str:
    """The source of the projector that llama-server -hf would take beside the model of that source, looked up once."""
    token, way = secrets.hub_token(settings.hub_token_file, settings.hub_endpoint), network(settings)
    look_up = partial(source.projector_of, of, endpoint=settings.hub_endpoint, token=token, network=way)
    return once(("projector", of, settings.hub_endpoint, way), look_up)


def take_secrets(settings: Settings) -> None:
    """Remove the secrets from the environment before a program is started that would inherit them: a command on
    this machine, git, pip. They are kept in this process."""
    places = [settings.hub_token_file or "env:HF_TOKEN", settings.gateway_api_key_file,
              *(instance.api_key_file for instance in settings.models)]  # fmt: skip
    for place in places:
        if place and place.startswith(secrets.VARIABLE):
            secrets.take(place.removeprefix(secrets.VARIABLE))


def instance_secrets(instance: Instance) -> dict[str, str]:
    """The texts of an instance's credentials by their names: API keys, TLS certificate and its key, prompt files.

    Raises `SecretError`, `CertificateError` and `PromptFileError`.
    """
    texts = {}
    if instance.api_key_file is not None:
        place = f"models: {instance.name}: api_key_file"
        texts[API_KEYS] = secrets.api_keys(instance.api_key_file, place)
    if instance.tls_certificate_file is not None and instance.tls_key_file is not None:
        texts |= certificates.pair(instance.tls_certificate_file, instance.tls_key_file, f"models: {instance.name}: ")
    for name, setting in prompt_files.SETTINGS.items():
        if place := getattr(instance, setting):
            texts[name] = prompt_files.read(place, f"models: {instance.name}: {setting}", name)
    return texts


def tune_prompt(instance: Instance) -> str:
    """The text of which a tune of the instance makes its prompts. Raises `PromptFileError`."""
    assert instance.tune_prompt_file is not None, "an instance without such a text is measured with random words"
    return prompt_files.text_of(
        instance.tune_prompt_file, f"models: {instance.name}: tune_prompt_file", MOST_TUNE_PROMPT
    )
