"""Which servers a gateway has, from what is known of its hosts."""

from dataclasses import replace

import pytest

from llamafleet.cli.arguments import default_data
from llamafleet.fleet import gateway
from llamafleet.fleet.gateway import Member, Offered, RecordError, Secret, Server, record, recorded, sha256
from llamafleet.settings.schema import Settings

KEYS = ("key-one-0000000000000000", "key-two-0000000000000000")
GATEWAY = "gw1"


def settings(**changes):
    return Settings.from_data({**default_data(), **changes})


def offered(name="qwen", model=None, serves_it=True, **changes):
    entry = {"name": name, "source": "/m.gguf", "port": 8080, "listen": "10.0.0.7", "allow_unauthenticated": True,
             **changes}  # fmt: skip
    [instance] = settings(models=[entry]).models
    return Offered(instance, model or name, 4, 8192, 90, serves_it)


def member(name="gpu1", *ones, reached_at="gpu1.example.net", absent=False):
    return Member(name, reached_at, None if absent else ones or (offered(),))


def found(*members, known=(), secrets=None, **changes):
    return gateway.servers(GATEWAY, settings(**changes), members, known, secrets or {})


def server(host="gpu1", **changes):
    made = Server("qwen", host, "qwen", "10.0.0.7", 8080, 4, 8192, "chat", False, 90)
    return replace(made, **changes)


def test_a_server_is_what_its_host_planned():
    assert found(member()).servers == (server(),)
    assert found(member()).problems == ()


@pytest.mark.parametrize(
    ("host", "listen", "address"),
    [
        ("gpu1", "10.0.0.7", "10.0.0.7"),
        ("gpu1", "0.0.0.0", "gpu1.example.net"),
        ("gpu1", "::", "gpu1.example.net"),
        (GATEWAY, "0.0.0.0", "127.0.0.1"),
        (GATEWAY, "::", "::1"),
        (GATEWAY, "127.0.0.1", "127.0.0.1"),
        (GATEWAY, "10.0.0.7", "10.0.0.7"),
    ],
)
def test_where_a_server_is_reached(host, listen, address):
    [one] = found(member(host, offered(listen=listen))).servers
    assert one.address == address


def test_loopback_of_another_host_is_a_problem_unless_it_is_left_out():
    [problem] = found(member(), member("gpu2", offered("other", listen="127.0.0.1"))).problems
    assert problem.startswith("gpu2: models: other: listen: the gateway on gw1 cannot reach 127.0.0.1")
    assert "gateway = False" in problem and "allowed_clients" in problem
    private = offered("other", listen="127.0.0.1", gateway=False)
    assert found(member(), member("gpu2", private)) == found(member())


def test_hosts_of_one_machine_are_reached_at_addresses_of_its_loopback():
    container = member("box2", offered(listen="127.0.1.2"), reached_at="127.0.1.2")
    assert [one.address for one in found(container).servers] == ["127.0.1.2"]


def test_a_host_that_is_not_in_the_run_keeps_what_is_known_of_it():
    known = (server(), server("gpu2", port=9000))
    result = found(member(), member("gpu2", absent=True), known=known)
    assert (result.servers, result.problems) == (known, ())
    assert result.notes == ("gpu2 is not in this run: the gateway keeps gpu2/qwen as it was",)


def test_a_host_that_left_the_inventory_leaves_the_gateway():
    assert found(member(), known=(server(), server("gone"))).servers == (server(),)


def test_an_instance_that_left_its_host_leaves_the_gateway():
    assert found(member(), known=(server(), server(instance="old", model="old"))).servers == (server(),)


def test_what_does_not_run_as_planned_stays_as_it_was():
    waiting = member("gpu1", offered(port=9999, serves_it=False))
    assert found(waiting, known=(server(),)).servers == (server(),)
    assert "keeps what it had of it" in found(waiting, known=(server(),)).notes[0]
    new = found(member(), member("gpu2", offered(serves_it=False)))
    assert (new.servers, "gpu2/qwen does not run as planned" in new.notes[0]) == ((server(),), True)


def test_copies_are_servers_of_one_model():
    ones = [offered(f"qwen-{number}", "qwen", port=8080 + number) for number in (1, 2)]
    servers = found(member("gpu1", *ones)).servers
    assert [(one.model, one.id, one.name) for one in servers] == [
        ("qwen", "gpu1:qwen-1", "gpu1/qwen-1"), ("qwen", "gpu1:qwen-2", "gpu1/qwen-2"),
    ]  # fmt: skip


def test_names_of_hosts_stay_apart_where_haproxy_has_no_such_characters():
    ids = {server(name).id for name in ("@local", "@docker/a", "_local", "gpu1.example.net", "a b", "a_b")}
    assert len(ids) == 6 and "gpu1.example.net:qwen" in ids
    assert all(set(one) <= {*"abcdefghijklmnopqrstuvwxyz0123456789_.-:"} for one in ids)


@pytest.mark.parametrize("name", ["v1", "models", "health"])
def test_a_model_cannot_have_a_path_of_the_gateway_s_own(name):
    [problem] = found(member("gpu1", offered(name))).problems
    assert f"{name!r} is a path of the gateway" in problem


def test_servers_of_one_name_do_the_same():
    [problem] = found(member(), member("gpu2", offered(serves="embedding"))).problems
    assert problem == "models: qwen: serves: one name for chat on gpu1 and embedding on gpu2: give them two names"


def test_a_gateway_with_nothing_to_serve_is_refused():
    [problem] = found(member(absent=True)).problems
    assert "has no server" in problem and "without --limit" in problem


def test_ports_of_the_gateway_s_host_are_taken_once():
    [problem] = found(member(GATEWAY, offered(port=8000))).problems
    assert problem == "gw1: gateway_port: 8000 is the port of qwen: give another one"
    assert found(member("gpu1", offered(port=8000))).problems == ()


# --- keys ------------------------------------------------------------------------------------------


def of_keys(**keys):
    return {(host, "qwen"): Secret(tuple(KEYS[number] for number in numbers)) for host, numbers in keys.items()}


@pytest.mark.parametrize(
    ("keys", "common"),
    [({"gpu1": (0,), "gpu2": (0,)}, 0), ({"gpu1": (0, 1), "gpu2": (1,)}, 1), ({"gpu1": (1,), "gpu2": ()}, 1)],
    ids=["the same", "while they are changed", "one needs none"],
)
def test_the_gateway_takes_a_key_that_all_servers_take(keys, common):
    result = found(member("gpu1"), member("gpu2"), secrets=of_keys(**keys))
    assert result.problems == ()
    assert gateway.common_key(result.servers, of_keys(**keys)) == KEYS[common]


def test_servers_without_a_key_in_common_are_a_problem():
    [problem] = found(member("gpu1"), member("gpu2"), secrets=of_keys(gpu1=(0,), gpu2=(1,))).problems
    assert problem.startswith("models: qwen: api_key_file: gpu1, gpu2 have no key in common") and KEYS[0] not in problem


def test_a_key_file_that_changed_while_its_host_is_not_in_the_run_is_a_problem():
    known = (server("gpu2", keys=(sha256(KEYS[0]),)),)
    [problem] = found(member("gpu2", absent=True), known=known, secrets=of_keys(gpu2=(1,))).problems
    assert "none of the keys that gpu2 had" in problem and "run with gpu2 too" in problem
    assert found(member("gpu2", absent=True), known=known, secrets=of_keys(gpu2=(1, 0))).problems == ()


def test_a_certificate_that_changed_while_its_host_is_not_in_the_run_is_a_problem():
    known = (server("gpu2", certificate=sha256("old")),)
    [problem] = found(
        member("gpu2", absent=True), known=known, secrets={("gpu2", "qwen"): Secret(certificate="new")}
    ).problems
    assert problem.startswith("gpu2: models: qwen: tls_certificate_file:")


# --- the record ----------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written():
    servers = (server("gpu1", keys=("a" * 64,)), server("gpu2", on_demand=True, certificate="b" * 64))
    assert recorded(record(servers)) == servers
    assert recorded({}) == ()


@pytest.mark.parametrize(
    "told", [{"schema": 2, "servers": {}}, {"schema": 1}, {"schema": 1, "servers": {"a": {"port": "x"}}},
             {"schema": 1, "servers": []}, {"schema": 1, "servers": {"a": 3}}],
)  # fmt: skip
def test_a_record_of_another_form_is_refused(told):
    with pytest.raises(RecordError, match=r"gateway/current/servers\.json"):
        recorded(told)
