"""What is left for people to do on a host, by what its programs print."""

from __future__ import annotations

import json
import os

import left
import pytest


@pytest.fixture
def says(monkeypatch):
    """What the host's programs print, by their words; others are not there."""
    answers = {}
    monkeypatch.setattr(left, "output_of", lambda words, seconds: answers.get(" ".join(words), ""))
    return answers


# --- firewall -------------------------------------------------------------------------------------

ZONE = """\
public (active)
  target: default
  icmp-block-inversion: no
  interfaces: eth0
  sources:
  services: dhcpv6-client ssh {services}
  ports: {ports}
  protocols:
  rich rules:
"""


@pytest.fixture
def firewalld(says):
    def running(ports="", services="", target="default", rich=""):
        text = ZONE.format(ports=ports, services=services).replace("target: default", f"target: {target}")
        says.update({
            "firewall-cmd --state": "running\n",
            "firewall-cmd --get-active-zones": "public\n  interfaces: eth0\n",
            "firewall-cmd --zone=public --list-all": text,
            "firewall-cmd --info-service=ssh": "ssh\n  ports: 22/tcp\n",
            "firewall-cmd --info-service=llm": "llm\n  ports: 8080/tcp 8081/tcp\n",
            "firewall-cmd --zone=public --list-rich-rules": rich,
        })  # fmt: skip

    return running


def test_a_port_that_firewalld_closes_is_said_with_the_way_out(firewalld):
    """ollama/ollama#8759: firewalld closes the port, and all was green."""
    firewalld()
    assert left.closed([8080]) == {
        "8080": "firewalld closes port 8080 (zone public): firewall-cmd --permanent --zone=public --add-port=8080/tcp && "
        "firewall-cmd --reload"
    }


@pytest.mark.parametrize(
    "opened",
    [{"ports": "8080/tcp"}, {"ports": "443/tcp 8000-8100/tcp"}, {"services": "llm"}, {"target": "ACCEPT"},
     {"rich": 'rule family="ipv4" source address="10.0.0.0/8" port port="8080" protocol="tcp" accept'}],
)  # fmt: skip
def test_a_port_that_firewalld_opens_is_no_work(firewalld, opened):
    firewalld(**opened)
    assert left.closed([8080]) == {}


def test_a_rule_that_drops_opens_nothing(firewalld):
    firewalld(rich='rule family="ipv4" port port="8080" protocol="tcp" drop')
    assert list(left.closed([8080])) == ["8080"]


@pytest.mark.parametrize("ports", ["8080/udp", "80/tcp", "18080/tcp 8081-9000/tcp"])
def test_another_port_is_not_this_one(firewalld, ports):
    firewalld(ports=ports)
    assert list(left.closed([8080])) == ["8080"]


UFW = (
    "Status: active\nLogging: on (low)\nDefault: {} (incoming), allow (outgoing)\n\nTo            Action      From\n{}"
)


@pytest.mark.parametrize(
    ("default", "rules", "closed"),
    [
        ("deny", "22/tcp        ALLOW IN    Anywhere\n", ["8080"]),
        ("deny", "8080/tcp      ALLOW IN    Anywhere\n", []),
        ("deny", "8080          ALLOW IN    10.0.0.0/8\n", []),
        ("deny", "8000:8100/tcp ALLOW IN    Anywhere\n".replace("tcp A", "tcp  A"), []),
        ("deny", "8080/tcp      DENY IN     Anywhere\n", ["8080"]),
        ("deny", "Anywhere      ALLOW IN    10.0.0.0/8\n", []),
        ("allow", "", []),
    ],
)
def test_ufw(says, default, rules, closed):
    says["ufw status verbose"] = UFW.format(default, rules)
    found = left.closed([8080])
    assert list(found) == closed
    assert not closed or found["8080"] == "ufw closes port 8080: ufw allow 8080/tcp"


def chain(policy):
    return {"chain": {"family": "inet", "table": "filter", "name": "input", "hook": "input", "policy": policy}}


def rule(*expressions):
    return {"rule": {"family": "inet", "table": "filter", "chain": "input", "expr": list(expressions)}}


def match(field, value, protocol="tcp"):
    return {"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": field}}, "right": value}}


STATE = rule({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established"]}}, {"accept": None})
LOOPBACK = rule({"match": {"op": "==", "left": {"meta": {"key": "iif"}}, "right": "lo"}}, {"accept": None})
NETWORK = rule(match("saddr", {"prefix": {"addr": "10.0.0.0", "len": 8}}, "ip"), {"accept": None})


@pytest.mark.parametrize(
    ("policy", "rules", "closed"),
    [
        ("drop", [STATE, LOOPBACK, rule(match("dport", 22), {"accept": None})], ["8080"]),
        ("drop", [STATE, rule(match("dport", {"set": [22, 8080]}), {"accept": None})], []),
        ("drop", [rule(match("dport", {"range": [8000, 8100]}), {"accept": None})], []),
        ("drop", [STATE, NETWORK], []),  # that network reaches it: nobody knows here whether others are to
        ("accept", [], []),
    ],
)
def test_nftables(says, policy, rules, closed):
    says["nft -j list ruleset"] = json.dumps({"nftables": [{"metainfo": {}}, chain(policy), *rules]})
    found = left.closed([8080])
    assert list(found) == closed
    assert not closed or "nft add rule inet filter input tcp dport 8080 accept" in found["8080"]


@pytest.mark.parametrize("said", ["", "no JSON", "[]", '{"nftables": []}'])
def test_a_host_without_a_firewall_closes_nothing(says, said):
    says["nft -j list ruleset"] = said
    assert left.closed([8080]) == {} and left.closed([]) == {}


# --- reboot ---------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path, monkeypatch, says):
    monkeypatch.setattr(left, "REBOOT", ((f"{tmp_path}/required", f"{tmp_path}/packages"), (f"{tmp_path}/needed", "")))
    monkeypatch.setattr(left, "KERNELS", str(tmp_path / "modules"))
    monkeypatch.setattr(left, "NEEDS_RESTARTING", str(tmp_path / "needs-restarting"))
    return tmp_path


def test_a_host_that_is_up_to_date_needs_no_reboot(system):
    assert left.reboot() == ""
    (system / "modules" / os.uname().release).mkdir(parents=True)
    assert left.reboot() == ""


def test_packages_that_want_a_reboot_are_named(system):
    (system / "required").touch()
    assert left.reboot() == f"packages want a reboot ({system}/required)"
    (system / "packages").write_text("linux-image-6.12\nlibc6\nlibc6\n")
    assert left.reboot() == f"libc6, linux-image-6.12 want a reboot ({system}/required)"


def test_opensuse_says_it_by_another_file(system):
    (system / "needed").touch()
    assert "want a reboot" in left.reboot()


def test_a_kernel_whose_modules_are_gone_wants_one(system, says):
    (system / "modules/6.99.0").mkdir(parents=True)
    says["systemd-detect-virt --container"] = "none\n"
    assert left.reboot().startswith(f"the kernel that runs, {os.uname().release}, is no longer installed")
    says["systemd-detect-virt --container"] = "lxc\n"  # whose kernel is its host's
    assert left.reboot() == ""


def test_needs_restarting_is_asked_where_it_is(system, says):
    (system / "needs-restarting").touch()
    says[f"{system}/needs-restarting -r"] = (
        "Core libraries or services have been updated.\nReboot is required to fully utilize\n"
    )
    assert left.reboot() == "packages want a reboot (needs-restarting -r)"
    says[f"{system}/needs-restarting -r"] = "No core libraries or services have been updated.\n"
    assert left.reboot() == ""
