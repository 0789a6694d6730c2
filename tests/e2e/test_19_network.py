"""Hosts as companies have them: without a network but the operator's SSH, and with a proxy as the only way out."""

import contextlib
import json
from pathlib import Path

import pytest

from sandbox import models, oracle_build, relay, upstream
from tests import company
from tests.e2e.conftest import PREFIX
from tests.e2e.deploying import PORT, on, pyinfra, settings, write_inventory

NAMES = ("git.company.example", "hub.company.example", "cdn.company.example")


def serves(host, port):
    """Does a real completion come out of it? Asked on the host, which nothing else reaches."""
    body = json.dumps({"prompt": "Once", "max_tokens": 4, "temperature": 0})
    url = f"http://{host.address}:{port}/v1/completions"
    answer = json.loads(on(host, "curl", "-sS", "-H", "Content-Type: application/json", "-d", body, url))
    return answer["usage"]["completion_tokens"] == 4


def own_settings(host, *sources, **more):
    """Settings of a host with a model for each source."""
    entries = [
        {"name": f"m{n}", "source": str(source), "port": PORT + n, "listen": host.address, "context_tokens": 1024,
         "threads": 1} for n, source in enumerate(sources)
    ]  # fmt: skip
    return {"models": entries, "speed_floor_percent": 0, **more}


def test_a_host_without_a_network_is_deployed_from_paths_alone(boot, turn, tmp_path):
    """An air-gapped site: the operator's model is sent, another one lies on the host; so does the source of llama.cpp."""
    upstream.ensure()
    turn.close()
    [host] = boot(1, f"{PREFIX}air", 44, packages=oracle_build.COMPILER, isolated=True)
    mirror = next(word for word in on(host, "cat", "/etc/apt/sources.list").split() if word.startswith("http"))
    assert host.run(["curl", "-sS", "--max-time", "5", mirror]).returncode == 6, "it has a network"
    sent = models.tiny(tmp_path)
    there = host.root / "srv" / "models" / "own.gguf"
    there.parent.mkdir(parents=True)
    there.write_bytes(models.tiny(tmp_path, "moe").read_bytes())
    asked = own_settings(host, sent, "/srv/models/own.gguf", llama_cpp_repository=str(upstream.REPOSITORY))
    written = write_inventory(tmp_path / "inventory.py", [(host, asked)])
    with oracle_build.compiling():
        run = pyinfra(written)
    assert run.code == 0, run.text
    assert serves(host, PORT) and serves(host, PORT + 1)
    assert "m0: source: " in run.text and "your machine's file is sent" in run.text
    assert "the host's own file is used" in run.text and not any("packages" in name for name in run.changed())
    served = json.loads(on(host, "cat", "/etc/llamafleet/instances/m1/plan.json"))["files"][0]["path"]
    assert on(host, "stat", "-c", "%i", served) == on(host, "stat", "-c", "%i", "/srv/models/own.gguf"), "it was copied"
    again = pyinfra(written)
    assert again.code == 0 and again.changed() == [], again.text


@pytest.fixture
def site(outside, tmp_path):
    """git and the Hub at names that only the proxy knows, with certificates of the company's own authority."""
    authority = company.Authority(tmp_path)
    context = authority.context(*NAMES)
    urls = (outside.repository, outside.hub.url, outside.hub.cdn_url)
    before = outside.hub.url, outside.hub.cdn_url
    with contextlib.ExitStack() as stack:
        fronts = [stack.enter_context(company.front(context, int(url.split(":")[2].split("/")[0]))) for url in urls]
        places = [f"https://{name}:{front.server_address[1]}" for name, front in zip(NAMES, fronts, strict=True)]
        outside.hub.url, outside.hub.cdn_url = places[1:]
        yield {
            "llama_cpp_repository": f"{places[0]}/{outside.repository.rpartition('/')[2]}",
            "hub_endpoint": places[1],
            "ca_file": str(authority.certificate),
        }
        outside.hub.url, outside.hub.cdn_url = before


@pytest.fixture
def proxy(boot):
    """A host with tinyproxy, which has a network and knows the names; the port."""
    [gate] = boot(1, f"{PREFIX}gate", 45, packages=["tinyproxy"])
    with (gate.root / "etc" / "hosts").open("a") as file:
        file.write(f"127.0.0.1 {' '.join(NAMES)}\n")
    port = 8800 + gate.number
    config = gate.root / "etc" / "tinyproxy" / "tinyproxy.conf"
    kept = [line for line in config.read_text().splitlines() if not line.startswith(("Port", "Listen", "LogLevel"))]
    ours = [f"Port {port}", f"Listen {gate.address}", "Allow 127.0.0.0/8", "LogLevel Connect"]
    config.write_text("\n".join([*kept, *ours, ""]))
    on(gate, "systemctl", "restart", "tinyproxy.service")
    return gate, port


@pytest.mark.long
def test_source_model_and_packages_come_by_the_only_way_out(boot, turn, outside, site, proxy, tmp_path):
    """A company's site: nothing is reached but a proxy, and servers have certificates of the company's own authority."""
    turn.close()
    gate, port = proxy
    [host] = boot(1, f"{PREFIX}inside", 46, packages=oracle_build.COMPILER, isolated=True)
    on(host, "dpkg", "--remove", "ninja-build")  # for the deploy to install
    inside = relay.End(gate.address, port, f"/proc/{host.pid}/ns/net")
    way = relay.Relay(inside, relay.End(gate.address, port))
    try:
        asked = settings(outside, host, **site, proxy=f"http://{gate.address}:{port}", build_cache=None)
        written = write_inventory(tmp_path / "inventory.py", [(host, asked)])
        with oracle_build.compiling():
            run = pyinfra(written)
        assert run.code == 0, run.text
        assert serves(host, PORT)
        assert any("packages" in name for name in run.changed()) and any("Fetch" in name for name in run.changed())
        log = Path(gate.root, "var/log/tinyproxy/tinyproxy.log").read_text()
        assert all(f"CONNECT {name}:" in log for name in NAMES) and "debian" in log, log[-2000:]
        # The store of the host is as it was, and no service knows of the proxy.
        store = on(host, "cat", "/etc/ssl/certs/ca-certificates.crt")
        own = Path(site["ca_file"]).read_text().split("-----")[2].strip()
        assert "BEGIN CERTIFICATE" in store and own not in store
        assert own in on(host, "cat", "/run/llamafleet/certificates.pem")
        unit = on(host, "systemctl", "cat", "llama-server-tiny.service").splitlines()
        # What llama-server itself knows of proxies, it does not inherit.
        assert [line for line in unit if "proxy" in line.lower() and not line.startswith("UnsetEnvironment=")] == []
        again = pyinfra(written)
        assert again.code == 0 and again.changed() == [], again.text
    finally:
        way.close()
