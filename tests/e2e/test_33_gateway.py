"""A gateway host before two that serve: one address, deployed, reloaded, drained, removed."""

import http.client
import json

import pytest

from sandbox import oracle_build
from tests.e2e import deploying
from tests.e2e.conftest import PREFIX
from tests.e2e.deploying import ask, connection, on, pyinfra
from tests.fleet.gateways import until

pytestmark = pytest.mark.long

CLIENT_KEY, SERVER_KEY = "a-client-s-own-key-0001", "the-servers-own-key-0001"
PORT = 8000
ADMIN = ("python3", "/opt/llamafleet/helpers/current/gateway_admin.py")


@pytest.fixture(scope="module")
def three(turn, boot):
    """A host for the gateway, and two that serve."""
    turn.close()
    return boot(3, f"{PREFIX}g", 3, packages=oracle_build.COMPILER)


@pytest.fixture(scope="module")
def fleet(three, outside, tmp_path_factory):
    """Writes the inventory; `gateway` are settings of the gateway."""
    folder, count = tmp_path_factory.mktemp("gateway"), iter(range(1000))
    for name, key in (("client-keys", CLIENT_KEY), ("server-keys", SERVER_KEY)):
        (folder / name).write_text(f"{key}\n")
        (folder / name).chmod(0o600)
    first, *others = three

    def write(gateway=None):
        front = {**outside.settings(), "models": [], "gateway_listen": first.address, "gateway_port": PORT,
                 "gateway_api_key_file": str(folder / "client-keys"), **(gateway or {})}  # fmt: skip
        model = {"api_key_file": str(folder / "server-keys"), "allowed_clients": [first.address]}
        behind = [
            (one.name, {**connection(one), **deploying.settings(outside, one, model=dict(model))}) for one in others
        ]
        path = folder / f"inventory{next(count)}.py"
        path.write_text(f"gateway = {[(first.name, {**connection(first), **front})]!r}\nservers = {behind!r}\n")
        return path

    return write


@pytest.fixture(scope="module")
def deployed_fleet(fleet):
    with oracle_build.compiling():
        done = pyinfra(fleet())
    assert done.code == 0, done.text
    return done


@pytest.fixture
def gateway(three, deployed_fleet):
    return three[0]


def complete(gateway, key=CLIENT_KEY, **more):
    body = {"prompt": "Once", "max_tokens": 4, "temperature": 0, **more}
    return ask(gateway, "/tiny/v1/completions", body, key, PORT)


def admin(gateway, *words):
    return json.loads(on(gateway, *ADMIN, *words))


def test_one_address_serves_what_two_hosts_do(gateway, three):
    status, answer = complete(gateway)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
    assert (
        ask(gateway, "/v1/completions", {"model": "tiny", "prompt": "Once", "max_tokens": 1}, CLIENT_KEY, PORT)[0]
        == 200
    )
    assert [one["id"] for one in ask(gateway, "/v1/models", None, CLIENT_KEY, PORT)[1]["data"]] == ["tiny"]
    assert (complete(gateway, key=SERVER_KEY)[0], complete(gateway, key=None)[0]) == (401, 401)
    names = [f"{host.name}/tiny" for host in three[1:]]
    until(
        lambda: [(name, one["up"]) for name, one in admin(gateway, "show").items()] == [(name, True) for name in names]
    )


def test_the_gateway_s_host_compiles_nothing_and_serves_nothing_itself(gateway):
    assert on(gateway, "sh", "-c", "ls /opt/llamafleet/releases") == ""
    assert on(gateway, "systemctl", "is-enabled", "llamafleet-gateway.service") == "enabled"
    secret = on(gateway, "sh", "-c", "stat -c '%a %U' /etc/llamafleet/gateway/current/*-keys")
    assert secret == "600 root\n600 root"
    assert CLIENT_KEY not in on(gateway, "sh", "-c", "cat /etc/llamafleet/gateway/current/*")


def test_a_second_run_changes_nothing_and_a_limited_one_forgets_no_server(gateway, fleet, three):
    again = pyinfra(fleet())
    assert (again.code, again.changed()) == (0, []), again.text
    limited = pyinfra(fleet(), "--limit", gateway.name, deploy="tasks.gateway.gateway")
    assert (limited.code, limited.changed()) == (0, []), limited.text
    assert complete(gateway)[0] == 200


def test_a_stream_lives_through_a_change_and_a_drain_too(gateway, fleet, three):
    name = f"{three[1].name}/tiny"
    admin(gateway, "drain", "--seconds", "600", name)
    connected = http.client.HTTPConnection(gateway.address, PORT, timeout=120)
    body = json.dumps({"prompt": "Once", "max_tokens": 900, "stream": True, "ignore_eos": True})
    connected.request("POST", "/tiny/v1/completions", body, {"Authorization": f"Bearer {CLIENT_KEY}"})
    stream = connected.getresponse()
    first = stream.read1()
    old = on(gateway, "readlink", "/etc/llamafleet/gateway/current")
    done = pyinfra(fleet(gateway={"gateway_queue_seconds": 61}), deploy="tasks.gateway.gateway")
    assert done.code == 0 and "Gateway | Put the gateway in service" in done.changed(), done.text
    assert f"{name} is drained" in done.text
    assert on(gateway, "readlink", "/etc/llamafleet/gateway/current") != old
    assert admin(gateway, "show")[name]["drained"]
    assert complete(gateway)[0] == 200
    assert (first + stream.read()).endswith(b"data: [DONE]\n\n")
    assert not admin(gateway, "undrain", name)[name]["drained"]


def test_a_drain_ends_by_itself(gateway, three):
    name = f"{three[1].name}/tiny"
    assert admin(gateway, "drain", "--seconds", "3", name)[name]["drained"]
    until(lambda: not admin(gateway, "show")[name]["drained"])
    assert admin(gateway, "drain", "--seconds", "600", name)[name]["drained_seconds"] > 590
    on(gateway, "systemctl", "kill", "--signal=KILL", "llamafleet-gateway.service")
    until(lambda: complete(gateway)[0] == 200)
    assert admin(gateway, "show")[name]["drained"]
    admin(gateway, "undrain", name)


def test_what_haproxy_cannot_run_with_leaves_the_old_configuration(gateway, fleet):
    """Port 22 is the SSH server's, which `haproxy -c` does not see."""
    before = on(gateway, "readlink", "/etc/llamafleet/gateway/current")
    failed = pyinfra(fleet(gateway={"gateway_port": 22}), deploy="tasks.gateway.gateway")
    assert failed.code != 0 and "the gateway runs with the configuration that it had" in failed.text, failed.text
    assert on(gateway, "readlink", "/etc/llamafleet/gateway/current") == before
    assert complete(gateway)[0] == 200


def test_leaving_removes_it(gateway, fleet):
    done = pyinfra(fleet(), "--limit", gateway.name, deploy="tasks.uninstall.uninstall")
    assert done.code == 0, done.text
    assert ask(gateway, "/health", None, None, PORT)[0] == 0
    assert on(gateway, "sh", "-c", "ls -d /etc/llamafleet /etc/systemd/system/llamafleet-* 2>/dev/null || true") == ""
