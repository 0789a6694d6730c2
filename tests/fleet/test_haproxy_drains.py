"""Servers that leave and come back while requests are under way, by a real HAProxy before stand-ins for llama-server."""

import collections
import concurrent.futures
import json
import random
import threading
import time

import pytest

from tests.fleet.gateways import CLIENT_KEY, Gateway, StandIn, needs_haproxy, server, settings, until

pytestmark = needs_haproxy


@pytest.fixture
def stand_ins():
    with StandIn("gpu1") as one, StandIn("gpu2") as two:
        yield one, two


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(16) as made:
        yield made


def serving(tmp_path, stand_ins, slots=1, **changes):
    """A gateway before the two, which serve one model."""
    return Gateway(tmp_path, settings(**changes), [server(one, slots=slots) for one in stand_ins])


def ask(gateway, session):
    return gateway.ask("/tiny/v1/completions", {}, X_Session_Id=str(session))


def switch(gateway, stand_in, state):
    assert gateway.admin(f"set server model:tiny/{stand_in.name}:tiny state {state}").strip() == ""


def all_at_work(gateway, pool, stand_ins):
    """A request at the one slot of each of the two, and one that waits for either: what will become of them."""
    until(lambda: servers_up(gateway) == len(stand_ins))  # a busy machine may be late for a check
    for one in stand_ins:
        one.gate.clear()
    asked = [pool.submit(ask, gateway, number) for number in range(2)]
    until(lambda: all(one.seen for one in stand_ins))
    asked.append(pool.submit(ask, gateway, 2))
    until(lambda: "BACKEND,1," in gateway.admin("show stat"))
    return asked


def servers_up(gateway):
    lines = gateway.admin("show stat").splitlines()
    return sum(line.startswith("model:tiny,") and ",BACKEND," not in line and ",UP," in line for line in lines)


def close(stand_in):
    """It refuses connections; what it works at goes on."""
    stand_in.shutdown()
    stand_in.server_close()


def statuses(asked):
    return [(one.result()[0], one.result()[2].get("error", {}).get("message")) for one in asked]


def stream(gateway, session):
    """What a short stream ended with."""
    connection = gateway.connection()
    body = json.dumps({"stream": True, "tokens": 3, "pause": 0.004})
    try:
        headers = {"Authorization": f"Bearer {CLIENT_KEY}", "X-Session-Id": str(session)}
        connection.request("POST", "/tiny/v1/completions", body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        return "whole" if text.endswith("data: 2\n\n") else f"{answer.status}: {text}"
    finally:
        connection.close()


def test_servers_that_leave_and_come_back_again_and_again_cost_no_request(tmp_path, stand_ins, pool):
    """More clients than slots, so that requests wait whenever a server is put back."""
    found, end, chance = collections.Counter(), threading.Event(), random.Random(1)

    def client(gateway, session):
        while not end.is_set():
            found[stream(gateway, session)] += 1

    with serving(tmp_path, stand_ins, slots=2) as gateway:
        clients = [pool.submit(client, gateway, number) for number in range(10)]
        over = time.monotonic() + 4
        while time.monotonic() < over:
            for one in stand_ins:
                for state in ("maint", "ready"):
                    switch(gateway, one, state)
                    time.sleep(chance.uniform(0.005, 0.05))
        end.set()
        for one in clients:
            one.result()
    assert list(found) == ["whole"] and found["whole"] > 100, found


def test_a_request_that_waits_in_a_process_from_before_a_reload_outlives_a_server(tmp_path, stand_ins, pool):
    """That process is not told of drains: it sends what waits to a server that was drained and has ended."""
    one, two = stand_ins
    with serving(tmp_path, stand_ins) as gateway:
        asked = all_at_work(gateway, pool, stand_ins)
        gateway.reload()
        switch(gateway, two, "maint")
        close(two)
        two.gate.set()
        assert asked[1].result()[0] == 200
        time.sleep(0.5)
        assert not asked[2].done()
        one.gate.set()
        assert statuses(asked) == [(200, None)] * 3


def test_a_server_that_is_gone_is_left_before_its_checks_say_so(tmp_path, stand_ins, pool):
    one, two = stand_ins
    with serving(tmp_path, stand_ins) as gateway:
        asked = all_at_work(gateway, pool, stand_ins)
        close(two)
        two.gate.set()
        until(lambda: ",DOWN," in gateway.admin("show stat"), 1.5)
        assert not asked[2].done()
        one.gate.set()
        assert statuses(asked) == [(200, None)] * 3


# --- what a client and the operator are told ------------------------------------------------------------


def test_answer_and_log_tell_the_queue_s_end_from_a_server_that_takes_nothing(tmp_path, stand_ins, pool):
    one, two = stand_ins
    close(two)
    servers = [server(one, slots=1), server(two, "other", on_demand=True)]
    with Gateway(tmp_path, settings(gateway_queue_seconds=1), servers) as gateway:
        one.gate.clear()
        first = pool.submit(ask, gateway, 1)
        until(lambda: one.seen)
        waited, refused = ask(gateway, 2), gateway.ask("/other/v1/embeddings?secret=1", {})
        one.gate.set()
        assert first.result()[0] == 200
        assert (waited[0], refused[0]) == (503, 503)
        assert "ms in the queue and 0 further tries" in waited[2]["error"]["message"]
        assert "and 3 further tries" in refused[2]["error"]["message"]
        until(lambda: gateway.log.read_text().count(" ms in all") == 2)
    lines = [line for line in gateway.log.read_text().splitlines() if " ms in all" in line]
    assert [("/tiny/v1/completions 503 sQ:" in lines[0]), ("/other/v1/embeddings 503 SC:" in lines[1])] == [True, True]
    assert "secret" not in gateway.log.read_text() and CLIENT_KEY not in gateway.log.read_text()
