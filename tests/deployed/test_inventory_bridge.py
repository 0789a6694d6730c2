"""tests/hosts/inventory_bridge.py: testinfra reaches the hosts of a pyinfra inventory as pyinfra does."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import testinfra

from tests.hosts.inventory_bridge import BridgeError, targets, with_copies

ROOT = Path(__file__).resolve().parents[2]

FLEET = """
web = [
    ("web1", {"ssh_hostname": "192.0.2.1", "ssh_port": 2222, "ssh_user": "root", "ssh_key": "/keys/one",
              "ssh_known_hosts_file": "/keys/known hosts", "ssh_strict_host_key_checking": "yes"}),
    ("web2", {"ssh_user": "ops", "_sudo": True}),
]
db = [("@ssh/db1", {"ssh_hostname": "2001:db8::1"}), ("@local", {"models": [
    {"name": "tiny", "source": "/srv/tiny.gguf", "port": 8080}]})]
"""


@pytest.fixture
def inventory(tmp_path):
    """Writes an inventory in a folder without group_data."""

    def write(text=FLEET):
        path = tmp_path / "fleet.py"
        path.write_text(text)
        return str(path)

    return write


def by_name(inventory, tmp_path, limit=()):
    return {target.name: target for target in targets(inventory, limit, tmp_path)}


def backend(target):
    return testinfra.get_host(target.spec).backend


def test_a_host_is_reached_as_the_inventory_says(inventory, tmp_path):
    reached = backend(by_name(inventory(), tmp_path)["web1"])
    assert (reached.NAME, reached.host.user, reached.host.name, reached.host.port) == (
        "ssh",
        "root",
        "192.0.2.1",
        "2222",
    )
    assert reached.ssh_identity_file == "/keys/one"
    assert not reached.sudo


def test_known_hosts_and_strictness_reach_ssh(inventory, tmp_path):
    """`ssh -G` prints how ssh reads the configuration file."""
    reached = backend(by_name(inventory(), tmp_path)["web1"])
    command = ["ssh", "-G", "-F", reached.ssh_config, "192.0.2.1"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "stricthostkeychecking true" in output
    assert "userknownhostsfile /keys/known hosts" in output.replace('"', "")
    assert "batchmode yes" in output


def test_first_contact_is_accepted_by_default_as_pyinfra_does(inventory, tmp_path):
    config = Path(backend(by_name(inventory(), tmp_path)["web2"]).ssh_config).read_text()
    assert "StrictHostKeyChecking accept-new" in config
    assert "UserKnownHostsFile" not in config


def test_no_ssh_process_stays_behind(inventory, tmp_path):
    command, _ = backend(by_name(inventory(), tmp_path)["web1"])._build_ssh_command("true")
    assert "ControlMaster" not in " ".join(command)


def test_sudo_is_used_where_the_inventory_says(inventory, tmp_path):
    hosts = by_name(inventory(), tmp_path)
    assert backend(hosts["web2"]).sudo
    assert backend(hosts["web2"]).host.user == "ops"
    assert not backend(hosts["@local"]).sudo


def test_sudo_works_for_this_machine_too(inventory, tmp_path):
    hosts = by_name(inventory('hosts = [("@local", {"_sudo": True, "_sudo_user": "root"})]'), tmp_path)
    assert backend(hosts["@local"]).NAME == "local"
    assert (backend(hosts["@local"]).sudo, backend(hosts["@local"]).sudo_user) == (True, "root")


def test_an_ipv6_address_is_no_port(inventory, tmp_path):
    reached = backend(by_name(inventory(), tmp_path)["@ssh/db1"])
    assert (reached.host.name, reached.host.port) == ("2001:db8::1", None)


def test_settings_come_with_the_projects_defaults(inventory, tmp_path):
    settings = by_name(inventory(), tmp_path)["@local"].settings
    assert [(instance.name, instance.port, instance.listen) for instance in settings.models] == [
        ("tiny", 8080, "127.0.0.1")
    ]
    assert by_name(inventory(), tmp_path)["web1"].settings.models == ()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ([], ["web1", "web2", "@ssh/db1", "@local"]),
        (["web"], ["web1", "web2"]),
        (["web2"], ["web2"]),
        (["web*"], ["web1", "web2"]),
        (["@local", "web1"], ["web1", "@local"]),
        (["fleet"], ["web1", "web2", "@ssh/db1", "@local"]),
    ],
)
def test_limit_is_pyinfras(inventory, tmp_path, limit, expected):
    assert list(by_name(inventory(), tmp_path, limit)) == expected


@pytest.mark.parametrize(
    ("text", "limit", "message"),
    [
        (FLEET, ["wbe1"], "--limit wbe1: no such group or host; known are .*web1"),
        ("hosts = []", [], "names no host"),
        ('hosts = [("@docker/debian", {})]', [], "@docker/debian: DockerConnector"),
        ('hosts = [("a", {"ssh_password": "hunter2"})]', [], "a: ssh_password would be visible"),
        ('hosts = [("a", {"prot": 1})]', [], "a: prot: unknown setting"),
        (
            'hosts = [("a", {"ssh_hostname": "-oProxyCommand=x"})]',
            [],
            "a: an address cannot begin with a dash",
        ),
    ],
)
def test_what_cannot_be_checked_is_named(inventory, tmp_path, text, limit, message):
    with pytest.raises(BridgeError, match=message) as error:
        targets(inventory(text), limit, tmp_path)
    assert "hunter2" not in str(error.value)


def test_a_missing_inventory_is_named(tmp_path):
    with pytest.raises(BridgeError, match=r"nowhere\.py: there is no such file"):
        targets("nowhere.py", [], tmp_path)


def test_reading_an_inventory_leaves_this_process_alone(inventory):
    """gevent's sockets and threads would change what every other test of the session runs on."""
    code = f"""
        import pathlib, socket, sys, tempfile
        from tests.hosts.inventory_bridge import targets
        before = socket.socket
        targets({inventory()!r}, [], pathlib.Path(tempfile.mkdtemp(dir={str(Path(inventory()).parent)!r})))
        import gevent.monkey
        sys.exit(gevent.monkey.is_module_patched("socket") or socket.socket is not before)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT).returncode == 0


def run_pytest(*words):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *words],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def test_the_folder_alone_asks_for_an_inventory():
    code, output = run_pytest("tests/hosts")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--inventory inventory/fleet.py" in output


def test_the_whole_project_leaves_the_folder_out():
    others = {path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name not in ("deployed", "hosts")}
    code, output = run_pytest("--collect-only", "tests", *(f"--ignore={path}" for path in others))
    assert code == pytest.ExitCode.OK, output
    assert "test_inventory_bridge.py" in output
    assert "tests/hosts/" not in output


def test_a_host_that_cannot_be_reached_fails_by_name(inventory):
    """Port 9 (discard) of a loopback address: nobody listens there."""
    text = 'hosts = [("box7", {"ssh_hostname": "127.0.0.1", "ssh_port": 9, "ssh_user": "root"})]'
    code, output = run_pytest("tests/hosts", "--inventory", inventory(text))
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "box7: cannot be reached: " in output
    assert "Connection refused" in output


def test_each_instance_is_a_test_of_its_own(inventory):
    code, output = run_pytest("tests/hosts", "--collect-only", "--inventory", inventory(), "--limit=@local")
    assert code == pytest.ExitCode.OK, output
    assert "test_release[@local]" in output
    assert "test_models[@local/tiny]" in output
    assert "test_gate[@local/tiny-gpu-memory]" in output
    assert "web1" not in output


def test_an_inventory_that_fails_names_its_line(tmp_path):
    path = tmp_path / "fleet.py"
    path.write_text("\nhosts = [unknown]\n")
    with pytest.raises(BridgeError, match=r"fleet.py: line 2: NameError: name 'unknown' is not defined"):
        targets(str(path), [], tmp_path)


def test_copies_are_checked_one_by_one(inventory, tmp_path):
    """A number of them is in the inventory; how many there are for a host's GPUs is what its deploy left."""
    models = [{"name": "a", "source": "/a.gguf", "port": 8080, "copies": 2},
              {"name": "b", "source": "/b.gguf", "port": 8090, "copies": "per_gpu"}]  # fmt: skip
    [target] = targets(inventory(f'web = [("web1", {{"models": {models}}})]'), [], tmp_path)
    assert [one.name for one in target.settings.models] == ["a-1", "a-2", "b"]
    names = ["a-1", "a-2", "b-1", "b-2", "b-3", "b-5", "b"]
    found = [(one.name, one.port) for one in with_copies(target.settings, names).models]
    assert found == [("a-1", 8080), ("a-2", 8081), ("b-1", 8090), ("b-2", 8091), ("b-3", 8092)]
    assert [one.name for one in with_copies(target.settings, []).models] == ["a-1", "a-2", "b-1"]
