"""What a gateway should have, from decisions about hosts of a run: who is in it, what serves by now, which secrets."""

from types import SimpleNamespace

import pytest

from llamafleet.cli.arguments import default_data
from llamafleet.fleet.gateway import record, sha256
from llamafleet.host import answers
from llamafleet.settings.schema import Settings
from tasks.lib import decision, gateways, lookups, moves
from tests.company import Authority

CLIENTS, SERVERS = "a-client-s-own-key-0001", "the-servers-own-key-0001"
NOTHING = answers.Gateway("2.6.12", None, False, False, None, {})


class Host(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """A gateway host and two that serve; `host.changes` are instances that differ from what is installed."""
    for name, key in (("clients", CLIENTS), ("servers", SERVERS)):
        (tmp_path / name).write_text(f"{key}\n")
        (tmp_path / name).chmod(0o600)
    lookups._known.clear()
    state = SimpleNamespace(inventory=[], active_hosts=set(), is_executing=False, limit=None)
    state.is_host_in_limit = lambda host: state.limit is None or host in state.limit

    def host(name, address, **data):
        made = Host(name=name, state=state, changes=(), groups=["gateway"] if name == "gw1" else [], refused=False)
        made.data = SimpleNamespace(dict=lambda: data, get={"ssh_hostname": address}.get)
        state.inventory.append(made)
        state.active_hosts.add(made)
        return made

    def decided(host):
        if host.refused:
            return None
        settings = Settings.from_data({**default_data(), **host.data.dict()})
        servings = [SimpleNamespace(name=one.name, instance=one, record={"gate": {"health_seconds": 90}},
                                    plan=SimpleNamespace(slots=4, context_tokens=8192)) for one in settings.models]  # fmt: skip
        changes = SimpleNamespace(services=dict.fromkeys(host.changes, ("it is new",)))
        return decision.Decision(SimpleNamespace(servings=servings, settings=settings), changes)

    monkeypatch.setattr(decision, "of_other", decided)
    model = {
        "name": "qwen",
        "source": "/m.gguf",
        "port": 8080,
        "listen": "10.0.0.7",
        "api_key_file": str(tmp_path / "servers"),
    }
    fleet = SimpleNamespace(
        gateway=host("gw1", "10.0.0.5", gateway_api_key_file=str(tmp_path / "clients")),
        one=host("gpu1", "10.0.0.7", models=[dict(model)]), two=host("gpu2", "10.0.0.8", models=[{**model, "listen": "10.0.0.8"}]),
        state=state, folder=tmp_path, model=model,
    )  # fmt: skip
    yield fleet
    lookups._known.clear()
    decision._made.clear()


def names(wanted):
    return [one.name for one in wanted.servers]


def installed(wanted, **changes):
    """What the host of this gateway answers."""
    there = {"version": "2.6.12", "digest": wanted.files.digest, "active": True, "enabled": True,
             "unit": sha256(wanted.unit), "servers": record(wanted.servers), **changes}  # fmt: skip
    return answers.Gateway(**there)


def test_a_gateway_has_the_servers_of_all_hosts(fleet):
    wanted = gateways.wanted(fleet.gateway, NOTHING)
    assert names(wanted) == ["gpu1/qwen", "gpu2/qwen"]
    assert [one.slots for one in wanted.servers] == [4, 4]
    assert wanted.files.secrets["server-keys"] == f"qwen {SERVERS}\n"
    assert wanted.files.secrets["client-keys"] == sha256(CLIENTS).upper() + "\n"
    assert next(gateways.differences(wanted, NOTHING)) == "it is new"


def test_one_that_is_as_it_should_be_differs_in_nothing(fleet):
    wanted = gateways.wanted(fleet.gateway, NOTHING)
    assert list(gateways.differences(gateways.wanted(fleet.gateway, installed(wanted)), installed(wanted))) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [({"active": False}, "llamafleet-gateway.service does not run"), ({"unit": None}, "llamafleet-gateway.service differs"),
     ({"enabled": False}, "llamafleet-gateway.service does not start with the host"),
     ({"version": None}, "HAProxy is not installed"), ({"digest": "0" * 16}, "its settings or keys have changed")],
    ids=["stopped", "unit", "boot", "no haproxy", "files"],
)  # fmt: skip
def test_each_difference_is_named(fleet, change, said):
    wanted = gateways.wanted(fleet.gateway, NOTHING)
    assert list(gateways.differences(wanted, installed(wanted, **change))) == [said]


def test_with_limit_the_other_hosts_stay_as_they_are_known(fleet):
    before = gateways.wanted(fleet.gateway, NOTHING)
    fleet.state.limit = [fleet.gateway]
    now = gateways.wanted(fleet.gateway, installed(before))
    assert now.files.digest == before.files.digest
    assert now.notes == tuple(
        f"{name} is not in this run: the gateway keeps {name}/qwen as it was" for name in ("gpu1", "gpu2")
    )


@pytest.mark.parametrize("how", ["failed", "refused"])
def test_a_host_that_failed_stays_as_it_is_known(fleet, how):
    before = gateways.wanted(fleet.gateway, NOTHING)
    fleet.two.data.dict()["models"][0]["port"] = 9999
    assert [one.port for one in gateways.wanted(fleet.gateway, installed(before)).servers] == [8080, 9999]
    fleet.two.refused = how == "refused"
    fleet.state.active_hosts -= {fleet.two} if how == "failed" else set()
    assert [one.port for one in gateways.wanted(fleet.gateway, installed(before)).servers] == [8080, 8080]


def test_what_this_run_sets_right_counts_once_it_serves(fleet, monkeypatch):
    """Before: as it will be, if this run has the stage; while it runs: once it has passed the gate."""
    fleet.two.changes = ("qwen",)
    assert names(gateways.wanted(fleet.gateway, NOTHING)) == ["gpu1/qwen"]
    decision._made[fleet.gateway] = {"services"}
    assert names(gateways.wanted(fleet.gateway, NOTHING)) == ["gpu1/qwen", "gpu2/qwen"]
    fleet.state.is_executing = True
    monkeypatch.setattr(moves, "_passed", set())
    assert names(gateways.wanted(fleet.gateway, NOTHING)) == ["gpu1/qwen"]
    monkeypatch.setattr(moves, "_passed", {("gpu2", "qwen")})
    assert names(gateways.wanted(fleet.gateway, NOTHING)) == ["gpu1/qwen", "gpu2/qwen"]


def test_copies_are_of_their_model(fleet):
    fleet.one.data.dict()["models"][0]["copies"] = 2
    wanted = gateways.wanted(fleet.gateway, NOTHING)
    assert [(one.name, one.model) for one in wanted.servers] == [
        ("gpu1/qwen-1", "qwen"), ("gpu1/qwen-2", "qwen"), ("gpu2/qwen", "qwen"),
    ]  # fmt: skip


def test_a_server_that_listens_everywhere_is_asked_where_its_host_is_reached(fleet):
    fleet.one.data.dict()["models"][0]["listen"] = "0.0.0.0"
    fleet.two.data.dict()["models"][0]["listen"] = "0.0.0.0"
    fleet.two.data.dict()["reached_at"] = "gpu2.lan"
    assert [one.address for one in gateways.wanted(fleet.gateway, NOTHING).servers] == ["10.0.0.7", "gpu2.lan"]


def test_problems_are_all_named(fleet):
    fleet.one.data.dict()["models"][0]["listen"] = "127.0.0.1"
    fleet.gateway.data.dict()["gateway_api_key_file"] = str(fleet.folder / "servers")
    with pytest.raises(gateways.GatewayError) as caught:
        gateways.wanted(fleet.gateway, NOTHING)
    assert [text.split(":")[0] for text in caught.value.problems] == ["gpu1", "gateway_api_key_file"]
    assert SERVERS not in str(caught.value)


def test_a_server_s_certificate_is_trusted_by_the_operator_s_authority(fleet):
    authority = Authority(fleet.folder)
    authority.context("gpu1.example.net")
    text = (fleet.folder / "gpu1.example.net.pem").read_text()
    key, certificate = text[: text.index("-----BEGIN CERT")], text[text.index("-----BEGIN CERT") :]
    (fleet.folder / "key.pem").write_text(key)
    (fleet.folder / "key.pem").chmod(0o600)
    (fleet.folder / "certificate.pem").write_text(certificate)
    fleet.one.data.dict()["models"][0] |= {"tls_certificate_file": str(fleet.folder / "certificate.pem"),
                                           "tls_key_file": str(fleet.folder / "key.pem")}  # fmt: skip
    fleet.one.data.dict()["ca_file"] = str(authority.certificate)
    wanted = gateways.wanted(fleet.gateway, NOTHING)
    [name] = [name for name in wanted.files.texts if name.startswith("trust-")]
    assert authority.certificate.read_text().splitlines()[-2] in wanted.files.texts[name]
    assert "verifyhost gpu1.example.net" in wanted.files.texts["haproxy.cfg"]
    fleet.one.data.dict()["ca_file"] = None
    assert (
        "ca-file @system-ca verifyhost gpu1.example.net"
        in gateways.wanted(fleet.gateway, NOTHING).files.texts["haproxy.cfg"]
    )
