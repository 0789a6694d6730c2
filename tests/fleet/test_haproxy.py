"""What llamafleet writes for HAProxy, by a real HAProxy before stand-ins for llama-server: who gets which request."""

import concurrent.futures
import contextlib
import json
import subprocess
import time
import urllib.request

import pytest

from llamafleet.fleet import haproxy
from llamafleet.fleet.gateway import Secret
from tests.company import Authority
from tests.fleet.gateways import (
    CLIENT_KEY,
    SERVER_KEY,
    Gateway,
    StandIn,
    needs_haproxy,
    server,
    settings,
    until,
)

pytestmark = needs_haproxy


@pytest.fixture
def stand_ins():
    with StandIn("gpu1") as one, StandIn("gpu2") as two, StandIn("gpu3") as three:
        yield one, two, three


@pytest.fixture
def gateway(tmp_path, stand_ins):
    """Two servers of one model, and one of another."""
    one, two, three = stand_ins
    with Gateway(tmp_path, settings(), [server(one), server(two), server(three, "other", serves="embedding")]) as made:
        yield made


def answered_by(gateway, path="/tiny/v1/completions", **headers):
    status, _, body = gateway.ask(path, {}, **headers)
    assert status == 200, body
    return body["server"]


def test_haproxy_finds_nothing_wrong_with_it(tmp_path, stand_ins):
    made = Gateway(tmp_path, settings(gateway_allowed_clients=["10.0.0.0/8", "fd00::/64"]), [server(stand_ins[0])])
    (made.run / "servers.state").write_text("1\n")
    done = subprocess.run(["haproxy", "-c", "-f", made.config], capture_output=True, text=True)
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stderr


def test_a_model_is_reached_by_its_path(gateway, stand_ins):
    assert gateway.ask("/other/v1/embeddings?x=1", {})[2] == {"server": "gpu3", "path": "/v1/embeddings?x=1"}
    assert answered_by(gateway, "/tiny/infill") in ("gpu1", "gpu2")


def test_a_model_is_reached_by_its_name_in_the_body(gateway):
    assert gateway.ask("/v1/embeddings", {"model": "other", "input": "x" * 300_000})[2]["server"] == "gpu3"
    assert gateway.ask("/v1/chat/completions", {"messages": "x" * 30_000, "model": "other"})[2]["server"] == "gpu3"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"messages": "x" * 100_000, "model": "other"}, 400, ["64 KiB", '"model" before "messages"', "/MODEL/v1/..."]),
        ({"messages": "x"}, 400, ["name no model", "tiny, other"]),
        (b"--x\r\nmultipart", 400, ["/MODEL/v1/..."]),
        ({"model": "gpt-4"}, 404, ["no such model", "tiny, other"]),
        ({"model": 7}, 404, ["no such model"]),
        ({"messages": {"model": "other"}}, 400, ["name no model"]),
    ],
    ids=["late", "none", "multipart", "unknown", "number", "deeper"],
)
def test_a_body_without_a_usable_model_is_told_what_to_do(gateway, body, status, words):
    found, _, answer = gateway.ask("/v1/chat/completions", body)
    assert (found, [word for word in words if word not in answer["error"]["message"]]) == (status, [])


def test_the_list_of_models_is_of_all(gateway, stand_ins):
    _, _, listed = gateway.ask("/v1/models")
    assert [one["id"] for one in listed["data"]] == ["tiny", "other"]
    assert listed["data"][1]["meta"] == {"serves": "embedding", "context_tokens": 4096, "servers": 1}
    assert gateway.ask("/v1/models/other")[2] == listed["data"][1]
    assert [one for stand_in in stand_ins for one in stand_in.seen] == []


@pytest.mark.parametrize("path", ["/slots", "/tiny/slots", "/tiny/metrics", "/tiny/props", "/tiny/lora-adapters", "/x"])
def test_what_is_the_operator_s_is_not_passed_on(gateway, stand_ins, path):
    assert gateway.ask(path, {})[0] == 404
    assert [one for stand_in in stand_ins for one in stand_in.seen] == []


# --- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "wrong-key-000000000000", SERVER_KEY], ids=["none", "wrong", "a server's"])
def test_a_client_needs_a_key_of_the_gateway_s_own(gateway, stand_ins, key):
    for path in ("/tiny/v1/completions", "/v1/models", "/v1/completions"):
        status, headers, answer = gateway.ask(path, {"model": "tiny"} if path != "/v1/models" else None, key=key)
        assert (status, headers["www-authenticate"], answer["error"]["code"]) == (401, "Bearer", 401)
    assert [one for stand_in in stand_ins for one in stand_in.seen] == []


@pytest.mark.parametrize("headers", [{"Authorization": f"bearer {CLIENT_KEY}"}, {"X_Api_Key": CLIENT_KEY}])
def test_a_key_comes_as_a_bearer_s_or_as_anthropic_s(gateway, headers):
    assert gateway.ask("/tiny/v1/messages", {}, key=None, **headers)[0] == 200


def test_neither_side_sees_the_other_s_key(gateway, stand_ins):
    _, headers, body = gateway.ask("/tiny/v1/completions", {}, X_Api_Key=CLIENT_KEY)
    assert SERVER_KEY not in f"{headers} {body}"
    [(_, sent, _)] = stand_ins[0].seen + stand_ins[1].seen
    lower = {name.lower(): value for name, value in sent.items()}
    assert (lower["authorization"], CLIENT_KEY in str(sent)) == (f"Bearer {SERVER_KEY}", False)


def test_keys_lie_in_files_for_root_alone(tmp_path, stand_ins):
    servers = [server(stand_ins[0])]
    access = haproxy.Access((CLIENT_KEY,), of_servers={("gpu1", "tiny"): Secret((SERVER_KEY,))})
    files = Gateway(tmp_path, settings(), servers, access).files
    assert not any(key in text for text in files.texts.values() for key in (CLIENT_KEY, SERVER_KEY))
    assert CLIENT_KEY not in files.secrets["client-keys"] and SERVER_KEY in files.secrets["server-keys"]
    assert SERVER_KEY not in repr(files) + repr(access)


def test_without_keys_everybody_may_ask(tmp_path):
    with StandIn("gpu1", key=None) as one:
        with Gateway(tmp_path, settings(), [server(one)], haproxy.Access()) as gateway:
            assert answered_by(gateway, key=None) == "gpu1"
        assert "authorization" not in {name.lower() for name in one.seen[0][1]}


# --- which server ------------------------------------------------------------------------------------


def test_a_session_stays_at_its_server_and_sessions_are_spread(gateway, stand_ins):
    homes = gateway.homes(range(20))
    assert sorted(homes.values()).count("gpu1") == 10
    for number in [*range(20), *reversed(range(20))]:
        assert answered_by(gateway, X_Session_Id=str(number)) == homes[number]


def test_without_a_header_the_key_is_the_session(gateway):
    assert len({answered_by(gateway) for _ in range(10)}) == 1


def test_a_session_waits_for_its_server_no_longer_than_one_request(gateway, stand_ins):
    """Two slots and one who waits; then a session gives up its cache for a free slot."""
    home = next(one for one in stand_ins if one.name == answered_by(gateway, X_Session_Id="s"))
    other = next(one for one in stand_ins[:2] if one is not home)
    until(gateway.is_idle)
    home.gate.clear()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        busy = [pool.submit(answered_by, gateway, X_Session_Id="s") for _ in range(3)]
        until(lambda: len(home.seen) == 3)  # the first one of before, and two slots
        until(lambda: f"{home.name}:tiny,1," in gateway.admin("show stat"))
        assert answered_by(gateway, X_Session_Id="s") == other.name
        home.gate.set()
        assert sorted(one.result() for one in busy) in ([home.name] * 3, sorted([home.name, home.name, other.name]))


def test_where_a_server_is_down_its_sessions_move_and_no_others(gateway, stand_ins):
    homes = {number: answered_by(gateway, X_Session_Id=str(number)) for number in range(20)}
    stand_ins[0].health = 503
    until(lambda: ",DOWN," in gateway.admin("show stat"))
    assert {answered_by(gateway, X_Session_Id=str(number)) for number in range(20)} == {"gpu2"}
    stand_ins[0].health = 200
    until(lambda: ",DOWN," not in gateway.admin("show stat"))
    stay = [number for number, home in homes.items() if home == "gpu2"]
    assert {answered_by(gateway, X_Session_Id=str(number)) for number in stay} == {"gpu2"}


@pytest.mark.parametrize("gone", [False, True], ids=["loads", "gone"])
def test_a_server_that_loads_or_is_gone_costs_no_request(gateway, stand_ins, gone):
    """Also before a check has seen it."""
    assert {*gateway.homes(range(6)).values()} == {"gpu1", "gpu2"}
    stand_ins[0].health = 503
    if gone:
        stand_ins[0].shutdown()
        stand_ins[0].server_close()
    assert {answered_by(gateway, X_Session_Id=str(number)) for number in range(6)} == {"gpu2"}


def test_a_server_that_does_not_take_the_key_gets_no_requests(gateway, stand_ins):
    stand_ins[0].key = "another-key-00000000000"
    until(lambda: ",DOWN," in gateway.admin("show stat") and "L7STS" in gateway.admin("show stat"))
    assert {answered_by(gateway, X_Session_Id=str(number)) for number in range(6)} == {"gpu2"}


def test_a_server_on_demand_is_asked_by_requests_alone(tmp_path):
    with StandIn("gpu1") as one, Gateway(tmp_path, settings(), [server(one, on_demand=True)]) as gateway:
        one.health = 401  # of a check, if there was one
        time.sleep(3)
        assert "no check" in gateway.admin("show stat")
        one.health = 200
        assert answered_by(gateway) == "gpu1"


# --- full and empty ------------------------------------------------------------------------------------


@pytest.fixture
def narrow(tmp_path):
    """One server with one slot, for which one request may wait, a second long."""
    with StandIn("gpu1") as one:
        asked = settings(gateway_queue_requests=1, gateway_queue_seconds=1)
        with Gateway(tmp_path, asked, [server(one, slots=1)]) as made:
            yield made, one


def test_the_queue_has_an_end_in_time_and_in_length(narrow):
    gateway, one = narrow
    one.gate.clear()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(gateway.ask, "/tiny/v1/completions", {})
        until(lambda: one.seen)
        waits = pool.submit(gateway.ask, "/tiny/v1/completions", {})
        until(lambda: "BACKEND,1," in gateway.admin("show stat"))
        status, headers, answer = gateway.ask("/tiny/v1/completions", {})
        assert (status, headers["retry-after"]) == (503, "10") and "queue is full" in answer["error"]["message"]
        status, headers, answer = waits.result()
        assert (status, headers["retry-after"]) == (503, "10") and "0 further tries" in answer["error"]["message"]
        one.gate.set()
        assert first.result()[0] == 200
    assert len(one.seen) == 1


def test_without_a_server_that_is_ready_a_client_is_told_to_come_back(narrow):
    gateway, one = narrow
    one.health = 503
    until(lambda: ",DOWN," in gateway.admin("show stat"))
    status, headers, answer = gateway.ask("/tiny/v1/completions", {})
    assert (status, headers["retry-after"]) == (503, "10") and "no server of this model" in answer["error"]["message"]
    assert gateway.ask("/v1/models")[0] == 200


# --- replies and reloads --------------------------------------------------------------------------------


def test_a_stream_is_passed_on_as_it_comes_and_lives_through_a_reload(gateway, stand_ins):
    connection = gateway.connection()
    body = json.dumps({"stream": True, "tokens": 60, "pause": 0.1})
    connection.request("POST", "/tiny/v1/completions", body, {"Authorization": f"Bearer {CLIENT_KEY}"})
    answer = connection.getresponse()
    first = answer.read1()
    assert first.startswith(b"data: 0") and b"data: 59" not in first
    gateway.reload()
    assert answered_by(gateway) in ("gpu1", "gpu2")
    text = first + answer.read()
    assert text.count(b"data: ") == 60 and text.endswith(b"data: 59\n\n")


@pytest.mark.long
def test_sessions_keep_their_servers_through_a_reload(gateway):
    """The old process hands them over; until ten seconds after its start it has not begun to."""
    time.sleep(12)
    homes = {number: answered_by(gateway, X_Session_Id=str(number)) for number in range(20)}
    gateway.reload()
    until(lambda: "used:20" in gateway.admin("show table model:tiny"))
    assert {number: answered_by(gateway, X_Session_Id=str(number)) for number in range(20)} == homes


# --- TLS ------------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path):
    folder = tmp_path / "authority"
    folder.mkdir()
    return Authority(folder)


def test_the_gateway_speaks_https(tmp_path, stand_ins, authority):
    authority.context("gateway.example.net")
    pem = (authority.folder / "gateway.example.net.pem").read_text()
    access = haproxy.Access((CLIENT_KEY,), pem, {("gpu1", "tiny"): Secret((SERVER_KEY,))})
    with Gateway(tmp_path, settings(), [server(stand_ins[0])], access) as gateway:
        assert answered_by(gateway) == "gpu1"


@pytest.mark.parametrize(
    ("names", "serves"), [(("gpu1.example.net",), True), (("other.example.net",), False)], ids=["its own", "another's"]
)
def test_a_server_s_certificate_must_be_its_own(tmp_path, authority, names, serves):
    """Signed by the operator's authority, and for this name."""
    context = authority.context(*names)
    certificate = "0123456789abcdef"  # the digest that the record has
    trusted = {certificate: (authority.certificate.read_text(), "gpu1.example.net")}
    access = haproxy.Access((CLIENT_KEY,), "", {("gpu1", "tiny"): Secret((SERVER_KEY,))}, trusted)
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(StandIn("gpu1", context=context))
        made = Gateway(tmp_path, settings(), [server(one, certificate=certificate)], access)
        gateway = stack.enter_context(made)
        if serves:
            assert answered_by(gateway) == "gpu1"
        else:
            until(lambda: ",DOWN," in gateway.admin("show stat"))
            assert gateway.ask("/tiny/v1/completions", {})[0] == 503


# --- what is seen of it -------------------------------------------------------------------------------------


def test_statistics_and_metrics_are_at_loopback(gateway):
    answered_by(gateway)
    port = gateway.settings.gateway_stats_port

    def page(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.read().decode()

    # It counts a request once its answer was sent.
    until(lambda: 'haproxy_backend_http_responses_total{proxy="model:tiny",code="2xx"} 1' in page("/metrics"))
    assert "model:tiny" in page("/")
    assert f"bind 127.0.0.1:{port}\n" in gateway.config.read_text()


def test_many_models_are_no_longer_lines(tmp_path, stand_ins):
    """HAProxy reads 64 words and 2048 characters of a line."""
    many = [server(stand_ins[0], f"a-model-with-quite-a-long-name-{number}") for number in range(120)]
    with Gateway(tmp_path, settings(), many) as gateway:
        assert gateway.ask("/v1/completions", {"model": many[119].model})[2]["server"] == "gpu1"
        assert "those of /v1/models" in gateway.ask("/v1/completions", {})[2]["error"]["message"]
