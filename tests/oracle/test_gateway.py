"""Real llama-servers behind a real HAProxy: conversations find what they have said before in a server's cache."""

import concurrent.futures
import contextlib

import pytest

from llamafleet.fleet import haproxy
from llamafleet.fleet.gateway import Secret, Server, sha256
from sandbox import models, oracle
from sandbox.layouts import TINY
from tests.fleet.gateways import CLIENT_KEY, SERVER_KEY, Gateway, needs_haproxy, settings, until

pytestmark = [pytest.mark.oracle, needs_haproxy]
SLOTS, SHARE = 2, 0.95
AT_ONCE = SLOTS  # requests: where more of one server come, it passes some on, and their conversations move


@pytest.fixture
def build():
    return oracle.build()


def server(stack, folder, build, name, model):
    """A llama-server as the gateway knows it."""
    port, keys = oracle.free_port(), folder / "keys"
    keys.write_text(f"{SERVER_KEY}\n{SERVER_KEY}\n")
    command = [build.llama_server, "--model", model, "--host", "127.0.0.1", "--port", str(port), "--ctx-size", "4096",
               "--parallel", str(SLOTS), "--threads", "1", "--cache-ram", "256", "--api-key-file", str(keys), "--no-ui",
               "--offline"]  # fmt: skip
    stack.enter_context(oracle.serving(command, port, folder / f"{name}.log"))
    return Server("tiny", name, "tiny", "127.0.0.1", port, SLOTS, 2048, "chat", False, 60, (sha256(SERVER_KEY),))


@contextlib.contextmanager
def behind(folder, build, names):
    """A gateway before servers of these names."""
    folder.mkdir()
    model = models.make(TINY["dense"], folder, seed=0)
    with contextlib.ExitStack() as stack:
        servers = [server(stack, folder, build, name, model) for name in names]
        known = {(one.host, one.instance): Secret((SERVER_KEY,)) for one in servers}
        made = Gateway(folder, settings(), servers, haproxy.Access((CLIENT_KEY,), of_servers=known))
        gateway = stack.enter_context(made)
        until(lambda: gateway.admin("show stat").count("L7OK") == len(names))
        yield gateway


def turn(gateway, conversation, number):
    """One more turn: prompt tokens, and those of them that were in the cache."""
    words = [f"{conversation} and {one} say {(conversation * 7 + one) % 97} things " * 3 for one in range(number + 1)]
    body = {"prompt": "".join(words), "max_tokens": 4, "temperature": 0}
    status, _, answer = gateway.ask("/tiny/v1/completions", body, X_Session_Id=f"conversation {conversation}")
    assert status == 200, answer
    return answer["usage"]["prompt_tokens"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def last_turns(gateway, conversations, turns):
    """Prompt tokens of all conversations' last turns, and those that were cached; several conversations at a time."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for number in range(turns):
            last = list(pool.map(lambda one, number=number: turn(gateway, one, number), range(conversations)))
    return tuple(map(sum, zip(*last, strict=True)))


@pytest.mark.parametrize(
    ("conversations", "turns", "servers"), [(8, 4, 2), pytest.param(50, 10, 4, marks=pytest.mark.long)]
)
def test_several_servers_find_as_much_in_their_caches_as_one(tmp_path, build, conversations, turns, servers):
    with behind(tmp_path / "one", build, ["a"]) as gateway:
        tokens, alone = last_turns(gateway, conversations, turns)
    assert alone > tokens / 2, "one server alone finds nothing: this compares nothing"
    with behind(tmp_path / "several", build, [*"abcdef"[:servers]]) as gateway:
        _, together = last_turns(gateway, conversations, turns)
        used = {
            line.rpartition("server_key=")[2]
            for line in gateway.admin("show table model:tiny").splitlines()[1:]
            if line
        }
    print(f"{tokens} tokens, {alone} cached of one server, {together} of {servers}")
    assert together >= SHARE * alone
    assert len(used) == servers
