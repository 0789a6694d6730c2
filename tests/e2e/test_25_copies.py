"""Two copies of a model on a host, K and V of different types over one pool; then one again."""

import itertools

import pytest

from tests.e2e import deploying
from tests.e2e.deploying import PORT, ask, main_pid, on, pyinfra, serves

TWO = (PORT, PORT + 1)


@pytest.fixture(scope="module")
def host(deployed):
    return deployed[0]


@pytest.fixture(scope="module")
def deploy(host, outside, tmp_path_factory):
    """Deploys so many copies of the tiny model, whose three slots share a pool."""
    folder, count = tmp_path_factory.mktemp("copies"), itertools.count()
    shape = {"slots": 3, "kv_types": ["q8_0/f16"], "kv_unified": True, "pool_tokens": 1536}

    def run(copies):
        data = deploying.settings(outside, host, model={**shape, "copies": copies})
        return pyinfra(deploying.write_inventory(folder / f"inventory{next(count)}.py", [(host, data)]))

    return run


def units(host):
    shown = on(host, "systemctl", "list-units", "--plain", "--no-legend", "llama-server-*.service")
    return [line.split()[0] for line in shown.splitlines()]


@pytest.mark.long
def test_two_copies_serve_on_ports_counted_up_and_one_is_left(deploy, host):
    first = deploy(2)
    assert first.code == 0, first.text
    assert units(host) == ["llama-server-tiny-1.service", "llama-server-tiny-2.service"]
    assert all(serves(host, port=port) for port in TWO)
    for port in TWO:  # one request may have 1024 tokens of the pool
        told = ask(host, "/props", port=port)[1]
        assert (told["total_slots"], told["default_generation_settings"]["n_ctx"]) == (3, 1024)
    pids = main_pid(host, "tiny-1"), main_pid(host, "tiny-2")
    assert deploy(2).changed() == []
    # One copy is the instance itself: it takes the first one's port, and the second leaves.
    back = deploy(1)
    assert back.code == 0, back.text
    assert units(host) == ["llama-server-tiny.service"] and serves(host)
    assert ask(host, "/health", port=PORT + 1)[0] == 0
    assert main_pid(host, "tiny") not in pids
