"""The unit and plan.json as text: what is decided once must be exactly what systemd starts."""

import dataclasses
import shlex
import shutil
import subprocess

import pytest

from llamafleet.build.release import Build
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.planner.result import Plan
from llamafleet.remote.common import core_of_unit, is_as_written
from llamafleet.service import command
from llamafleet.service.record import START_SECONDS, health_seconds, plan_record, url_host
from llamafleet.service.unit import groups, liveness_texts, unit_text
from tasks.lib.templates import render
from tests import planning
from tests.exposure import exposure
from tests.service.test_changes import INSTALLED

PATH = "/var/lib/llamafleet/models/m-123/Qwen3-8B.gguf"


HOST = dataclasses.replace(INSTALLED, device_classes=("drm",), gpu_groups=("render", "video"))


# What an operator may add: variables, and a disk for models.
MORE = {
    "environment": {"HSA_OVERRIDE_GFX_VERSION": "10.3.0", "A": '100 % "b" \\ $c'},
    "stores": ("/mnt/big/models/m-123",),
}


def made(gpus, installed=HOST, layout="Qwen3-8B", cpu=(), python="python3", more=(), **asked):
    """(unit text, record, argv) of a plan for a published model on a host with these GPUs' MiB. `more`: see MORE."""
    wanted = planning.settings({"context_tokens": 4096, **asked})
    (instance,) = wanted.models
    [plan] = planning.plans(planning.machine(gpus, cpu=cpu), [(layout,)], wanted)
    build = Build(
        commit="c" * 40, backend=plan.backend, toolkit=None, architectures=(), machine_arch="x86_64", libc="2.41",
        cpu_flags=(), kv_types=("f16",), ui=False, tls=False,
    )  # fmt: skip
    model = ModelFiles((RemoteFile("Qwen3-8B.gguf", "https://x/y", 5, "a" * 64),), planning.header(layout))
    argv = (f"{build.release}/bin/llama-server", *command.argv(plan, instance, PATH))
    record = plan_record(instance, plan, build, model, PATH, argv, speed_floor_percent=40, alone=True)
    return (
        unit_text(
            render,
            instance,
            plan,
            build,
            installed,
            record,
            "feedfacefeedface",
            allow_swap=False,
            python=python,
            **dict(more),
        ),
        record,
        argv,
    )


def directive(unit, name):
    """All values of a directive, continued lines joined."""
    joined = unit.replace("\\\n", " ")
    return [line.split("=", 1)[1] for line in joined.splitlines() if line.startswith(name + "=")]


def test_the_command_line_is_the_plan_s():
    unit, record, argv = made([24564])
    (line,) = directive(unit, "ExecStart")
    # Of systemd's quoting this command uses what a shell reads alike, and $$ and %% for themselves.
    assert shlex.split(line.replace("$$", "$").replace("%%", "%")) == list(argv) == record["gate"]["argv"]


def test_the_checks_run_with_the_python_that_is_named():
    (usual,) = directive(made([24564])[0], "ExecStartPost")
    assert usual.startswith('+/usr/bin/python3 -s -E -B "/opt/llamafleet/helpers/feedfacefeedface/gate.py" "start"')
    (named,) = directive(made([24564], python="/usr/bin/python3.11")[0], "ExecStartPost")
    assert named == usual.replace("/usr/bin/python3 ", "/usr/bin/python3.11 ")
    asked = planning.settings({})
    other = dataclasses.replace(asked, python="/usr/bin/python3.11")
    before, after = (next(iter(liveness_texts(render, asked.models[0], one, "k1").values())) for one in (asked, other))
    assert "ExecStart=/usr/bin/python3 -s" in before
    assert after == before.replace("/usr/bin/python3 ", "/usr/bin/python3.11 ")


def test_backslashes_reach_llama_server():
    unit, _, argv = made([24564], layout="gpt-oss-120b")
    pattern = argv[argv.index("--override-tensor") + 1]
    assert "\\." in pattern
    (line,) = directive(unit, "ExecStart")
    # systemd.service: in double quotes two backslashes are one.
    assert f'"{pattern}"'.replace("\\", "\\\\") in line


def test_a_gpu_is_not_hidden_and_no_other_is_seen():
    unit, record, _ = made([24564])
    assert not directive(unit, "PrivateDevices") and directive(unit, "DevicePolicy") == ["closed"]
    assert {"char-nvidia rwm", "char-nvidia-uvm rwm", "char-drm rwm"} <= set(directive(unit, "DeviceAllow"))
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in directive(unit, "Environment")
    (gpu,) = record["gate"]["gpus"]
    assert f"CUDA_VISIBLE_DEVICES={gpu['uuid']}" in directive(unit, "Environment")
    assert gpu["planned_bytes"] > 4 << 30


def test_a_driver_that_was_used_once_more_does_not_change_the_unit():
    later = dataclasses.replace(HOST, device_classes=("drm", "nvidia-uvm", "nvidia-caps"))
    assert made([24564], later)[0] == made([24564])[0]


def test_nvidias_nodes_of_a_group_add_that_group_and_no_other_unit_changes():
    """ollama#2838, netdata#21359: nodes of mode 0660 and group video."""
    assert not directive(made([24564])[0], "SupplementaryGroups")
    shut = dataclasses.replace(HOST, nvidia_groups=("video",))
    assert directive(made([24564], shut)[0], "SupplementaryGroups") == ["video"]
    assert not directive(made([], shut)[0], "SupplementaryGroups")


def test_without_a_gpu_there_are_no_devices():
    unit, record, _ = made([])
    assert directive(unit, "PrivateDevices") == ["yes"] and not directive(unit, "DeviceAllow")
    assert record["gate"]["gpus"] == []


def test_a_unit_calls_the_helpers_that_it_was_made_with():
    (line,) = directive(made([])[0], "ExecStartPost")
    assert "/opt/llamafleet/helpers/feedfacefeedface/gate.py" in line and "current" not in line


def test_a_server_with_keys_does_not_start_with_an_empty_key_file():
    unit = made([], api_key_file="/home/me/keys")[0]
    (path,) = [value.split(":")[1] for value in directive(unit, "LoadCredential")]
    assert directive(unit, "AssertFileNotEmpty") == [f"|{path}"] and directive(unit, "AssertPathExists") == [
        f"|!{path}"
    ]
    assert not directive(made([])[0], "AssertFileNotEmpty")


def test_the_log_of_a_server_with_a_gpu_is_bounded():
    assert directive(made([24564])[0], "LogRateLimitBurst") == ["3000"]


def on(systemd, **more):
    return dataclasses.replace(HOST, ground={"systemd": systemd}, **more)


def pauses(unit):
    return [directive(unit, name) for name in ("RestartSec", "RestartSteps", "RestartMaxDelaySec")]


@pytest.mark.parametrize(
    ("systemd", "expected"),
    [
        ("257 (257.13-1~deb13u1)", [["5"], ["6"], ["120"]]),
        ("254", [["5"], ["6"], ["120"]]),
        ("253 (253.5-1ubuntu6)", [["30"], [], []]),
        ("252 (252.39-1~deb12u1)", [["30"], [], []]),
        ("", [["30"], [], []]),
    ],
)
def test_a_server_is_tried_for_ever_with_pauses_that_this_systemd_knows(systemd, expected):
    """NixOS/nixpkgs#487054, ollama/ollama#7669, #11963: it gave up for good after 25 s."""
    unit = made([24564], on(systemd))[0]
    assert pauses(unit) == expected
    # No start is one too many, and no pause is longer than some minutes.
    assert directive(unit, "StartLimitIntervalSec") == ["0"] and not directive(unit, "StartLimitBurst")
    assert directive(unit, "Restart") == ["on-failure"]


def test_another_systemd_changes_no_line_that_a_running_server_depends_on():
    newer, older = made([24564], on("257"))[0], made([24564], on("252"))[0]
    assert newer != older and core_of_unit(newer) == core_of_unit(older)


def test_the_unit_of_an_earlier_version_is_replaced_while_its_server_runs_on():
    """As 39f1a14 wrote it for a GPU: it gave up after five starts, and made the nodes of nvidia-uvm alone."""
    unit = made([4096, 4096], on("257", boot_units=UNITS))[0]
    earlier = unit.replace("StartLimitIntervalSec=0", "StartLimitIntervalSec=1800\nStartLimitBurst=5")
    earlier = earlier.replace("RestartSteps=6\nRestartMaxDelaySec=120\n", "")
    earlier = earlier.replace("ExecStartPre=-+/usr/bin/nvidia-modprobe -c0 -c1 -c255\n", "")
    earlier = earlier.replace(" dkms.service nvidia-fabricmanager.service", "")
    assert len(unit.splitlines()) == len(earlier.splitlines()) + 2 and unit != earlier
    assert core_of_unit(unit) == core_of_unit(earlier)


UNITS = {"gpu": ("dkms.service", "nvidia-fabricmanager.service"), "network": ("tailscaled.service",)}


@pytest.mark.parametrize(
    ("gpus", "listen", "after"),
    [
        ([], "127.0.0.1", "network-online.target"),
        ([], "0.0.0.0", "network-online.target"),
        ([], "100.64.0.7", "network-online.target tailscaled.service"),
        (
            [24564],
            "127.0.0.1",
            "network-online.target nvidia-persistenced.service dkms.service nvidia-fabricmanager.service",
        ),
    ],
)
def test_a_server_waits_for_what_the_host_has_of_drivers_and_networks(gpus, listen, after):
    """ollama/ollama#11963: the fabric manager; nixos#12: tailscale's address."""
    unit = made(gpus, on("257", boot_units=UNITS), listen=listen, allow_unauthenticated=True)[0]
    assert directive(unit, "After") == [after]
    plain = made(gpus, on("257"), listen=listen, allow_unauthenticated=True)[0]
    assert core_of_unit(unit) == core_of_unit(plain)


def test_the_nodes_of_all_planned_gpus_are_made_before_a_start():
    """NixOS/nixpkgs#73804: /dev/nvidia1 is missing after a boot."""
    unit = made([4096, 4096], on("257", nvidia_minors={"0000:01:00.0": 3}))[0]
    assert directive(unit, "ExecStartPre") == [
        "-+/usr/bin/nvidia-modprobe -c3 -c1 -c255", "-+/usr/bin/nvidia-modprobe -c0 -u",
    ]  # fmt: skip
    assert not directive(made([])[0], "ExecStartPre")


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("cuda", ("video",)), ("hip", ("render",)), ("vulkan", ("render", "video")), ("cpu", ())],
)
def test_each_backend_has_the_groups_of_its_nodes_once(backend, expected):
    assert groups(backend, on("257", gpu_groups=("render",), nvidia_groups=("video",))) == expected


def test_the_operator_s_variables_are_in_the_unit():
    """ggml-org/llama.cpp#14421: HSA_OVERRIDE_GFX_VERSION."""
    unit = made([24564], more=MORE)[0]
    words = directive(unit, "Environment")
    assert '"HSA_OVERRIDE_GFX_VERSION=10.3.0"' in words and '"A=100 %% \\"b\\" \\\\ $c"' in words
    assert [word for word in words if word[0] != '"'] == directive(made([24564])[0], "Environment")


def test_a_server_starts_when_the_disk_of_its_model_is_mounted():
    """ollama/ollama#2701, #14347, #1311: models on another disk."""
    unit = made([], more={"stores": ["/mnt/big/models/m-123"]})[0]
    assert directive(unit, "RequiresMountsFor") == ["/mnt/big/models/m-123"]
    assert not directive(made([])[0], "RequiresMountsFor")
    assert core_of_unit(unit) == core_of_unit(made([])[0])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/mnt/big", "mnt-big.mount"),
        ("/mnt/big-disk", "mnt-big\\x2ddisk.mount"),
        ("/srv/.a b/c.d", "srv-.a\\x20b-c.d.mount"),
        ("/.a", "\\x2ea.mount"),
    ],
)
def test_a_disk_that_is_mounted_late_starts_its_servers(path, name):
    unit = made([], more={"stores": [f"{path}/m-123"], "mount": path})[0]
    assert directive(unit, "WantedBy") == ["multi-user.target", name]
    if shutil.which("systemd-escape"):
        command = ["systemd-escape", "--path", "--suffix=mount", path]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == name
    assert directive(made([], more=MORE)[0], "WantedBy") == ["multi-user.target"]


def test_a_disk_for_models_below_a_hidden_folder_is_seen():
    hidden, _ = directive(made([], more={"stores": ["/srv/models/m-123"]})[0], "InaccessiblePaths")
    assert "-/srv" not in hidden.split() and "-/var/log" in hidden.split()
    assert "-/srv" in directive(made([], more={"stores": ["/mnt/m"]})[0], "InaccessiblePaths")[0].split()


def test_variables_are_part_of_what_a_plan_record_stands_for():
    (instance,) = planning.settings({}).models
    [plan] = planning.plans(planning.machine([]), [("Qwen3-8B",)], planning.settings({}))
    build = Build(
        commit="c" * 40, backend="cpu", toolkit=None, architectures=(), machine_arch="x86_64", libc="2.41",
        cpu_flags=(), kv_types=("f16",), ui=False, tls=False,
    )  # fmt: skip
    model = ModelFiles((RemoteFile("Qwen3-8B.gguf", "https://x/y", 5, "a" * 64),), planning.header("Qwen3-8B"))

    def record(**more):
        found = plan_record(instance, plan, build, model, PATH, ("x", "--batch-size", "1", "--ctx-size", "1"),
                            speed_floor_percent=40, alone=True, **more)  # fmt: skip
        assert is_as_written(found)
        return found

    plain = record()
    assert "environment" not in plain and record(environment={})["identity"] == plain["identity"]
    assert record(environment={"A": "1"})["identity"] != plain["identity"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, {}),
        (
            {"serves": "embedding", "pooling": "last"},
            {"serves": "embedding", "pooling": "last", "vector_elements": 4096},
        ),
    ],
)
def test_the_gate_is_told_what_is_served_and_of_a_chat_nothing_new(asked, told):
    _, record, _ = made([], **asked)
    assert {
        key: value
        for key, value in record["gate"].items()
        if key in ("serves", "pooling", "vector_elements", "rerank_example")
    } == told
    assert (record["plan"]["expected"] is None) is bool(told)


def test_keys_come_as_a_credential_and_only_where_there_are_keys():
    assert not directive(made([])[0], "LoadCredential")
    (credential,) = directive(made([], api_key_file="/home/me/keys")[0], "LoadCredential")
    assert credential.endswith("/api-keys")
    assert "/home/me" not in made([], api_key_file="/home/me/keys")[0]


def test_memory_is_bounded_by_the_plan():
    unit, record, _ = made([])
    (limit,) = directive(unit, "MemoryMax")
    host = next(row for row in record["plan"]["ledger"] if row["device"] == "host")
    assert int(limit) > sum(host[part] for part in ("weights_bytes", "kv_bytes", "compute_bytes"))
    assert directive(unit, "MemorySwapMax") == ["0"]


def test_free_bytes_drift_without_changing_the_identity(monkeypatch):
    _, record, _ = made([24564])
    plan = record["plan"]
    assert plan["ledger"][0]["free_bytes"] > 0
    monkeypatch.setattr(Plan, "to_json", lambda self: {**plan, "ledger": []})
    assert made([24564])[1]["identity"] == record["identity"]


def test_another_context_is_another_identity():
    assert made([], context_tokens=8192)[1]["identity"] != made([])[1]["identity"]


@pytest.mark.parametrize(("address", "host"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.0.0.7", "10.0.0.7")])
def test_the_gate_asks_where_the_host_reaches_it(address, host):
    assert url_host(address) == host


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here to ask")
@pytest.mark.parametrize("gpus", [[], [24564]], ids=["cpu", "gpu"])
def test_systemd_understands_every_line(gpus, tmp_path):
    version = subprocess.run(["systemctl", "--version"], capture_output=True, text=True).stdout.split()[1]
    here = dataclasses.replace(HOST, ground={"systemd": version})
    unit, _, _ = made(gpus, here, cpu=HYBRID | TWO_NODES, api_key_file="/home/me/keys", more=MORE)
    file = tmp_path / "llama-server-model.service"
    # Programs and users of a host are not on this machine.
    unit = unit.replace(directive(unit, "ExecStart")[0].split(" ")[0], '"/bin/true"').replace("llamafleet\n", "root\n")
    file.write_text(unit)
    done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if file.name in line]
    assert not [line for line in lines if "Unknown" in line or "Failed to parse" in line or "ignoring" in line], lines


def test_planned_bytes_are_what_llama_cpp_allocates():
    _, record, _ = made([24564])
    row = next(row for row in record["plan"]["ledger"] if row["device"] == "GPU0")
    (gpu,) = record["gate"]["gpus"]
    assert gpu["planned_bytes"] == row["weights_bytes"] + row["kv_bytes"] + row["compute_bytes"]


def test_loading_time_grows_with_the_model():
    header = planning.header("Qwen3-8B")
    large = dataclasses.replace(header, file_bytes=tuple(10 * size for size in header.file_bytes))
    assert health_seconds(ModelFiles((), large)) > health_seconds(ModelFiles((), header)) > START_SECONDS


@pytest.mark.parametrize(
    ("gpus", "listen", "most"),
    [([], "127.0.0.1", 1.0), ([], "0.0.0.0", 1.2), ([24564], "127.0.0.1", 1.3), ([24564], "0.0.0.0", 1.5)],
)
def test_exposure_is_what_the_documents_say(gpus, listen, most, tmp_path):
    unit, _, _ = made(gpus, listen=listen, allow_unauthenticated=True)
    score = exposure(unit, tmp_path)
    assert score <= most


def test_a_liveness_check_is_two_units_or_none():
    wanted = planning.settings({"context_tokens": 4096})
    (instance,) = wanted.models
    units = liveness_texts(
        render, instance, dataclasses.replace(wanted, liveness_seconds=90, liveness_interval_seconds=7), "k1"
    )
    check, timer = (units[f"llama-server-{instance.name}-liveness.{kind}"] for kind in ("service", "timer"))
    assert all(text.startswith("# Made by llamafleet") for text in units.values()) and len(units) == 2
    (line,) = directive(check, "ExecStart")
    assert shlex.split(line)[-3] == "/opt/llamafleet/helpers/k1/liveness.py"
    assert shlex.split(line)[-2:] == [f"/etc/llamafleet/instances/{instance.name}/plan.json", "90"]
    assert directive(timer, "OnUnitInactiveSec") == ["7"] and directive(timer, "PartOf") == [instance.unit]
    assert liveness_texts(render, instance, dataclasses.replace(wanted, liveness_seconds=0), "k1") == {}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here to ask")
def test_systemd_understands_the_liveness_check(tmp_path):
    wanted = planning.settings({"context_tokens": 4096})
    for name, text in liveness_texts(render, wanted.models[0], wanted, "k1").items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True)
    lines = [
        line for line in (done.stdout + done.stderr).splitlines() if "-liveness" in line and "not found" not in line
    ]
    assert not lines, lines


@pytest.mark.parametrize(
    ("listen", "family", "denied"),
    [
        ("127.0.0.1", "AF_INET", True),
        ("::1", "AF_INET6", True),
        ("0.0.0.0", "AF_INET", False),
        ("::", "AF_INET6", False),
    ],
)
def test_it_speaks_with_those_it_serves_only(listen, family, denied):
    unit, _, _ = made([], listen=listen, allow_unauthenticated=True, port=8123)
    assert directive(unit, "RestrictAddressFamilies") == [family]
    assert directive(unit, "SocketBindDeny") == ["any"] and directive(unit, "SocketBindAllow") == ["tcp:8123"]
    assert (directive(unit, "IPAddressDeny"), directive(unit, "IPAddressAllow")) == (
        (["any"], ["localhost"]) if denied else ([], [])
    )


@pytest.mark.parametrize(
    ("listen", "clients", "allowed"),
    [
        ("10.0.0.7", ["10.1.0.0/16", "fd00::/8"], ["localhost 10.0.0.7 10.1.0.0/16 fd00::/8"]),
        ("0.0.0.0", ["10.1.0.0/16", "10.2.0.3"], ["localhost 10.1.0.0/16 10.2.0.3"]),
        ("fe80::1%eth0", ["fe80::/10"], ["localhost fe80::1 fe80::/10"]),
        ("127.0.0.1", ["10.1.0.0/16"], ["localhost"]),  # nobody else reaches it anyway
        ("10.0.0.7", [], []),
    ],
)
def test_clients_that_may_reach_it_are_told_to_systemd(listen, clients, allowed):
    unit, _, _ = made([], listen=listen, allowed_clients=clients, allow_unauthenticated=True)
    assert directive(unit, "IPAddressAllow") == allowed
    assert directive(unit, "IPAddressDeny") == ["any"] * len(allowed)


def test_programs_come_from_the_release_alone():
    unit, _, argv = made([])
    release = argv[0].removesuffix("/bin/llama-server")
    (allowed,) = directive(unit, "ExecPaths")
    assert directive(unit, "NoExecPaths") == ["/"]
    assert allowed.split()[0] == release and not {"/usr", "/usr/bin", "-/usr/bin", "/"} & set(allowed.split())


HYBRID = {"performance_cpus": "0-5,8"}
TWO_NODES = {"numa_nodes": 2, "numa_node_list": "0-1"}


def test_a_plans_cpus_and_nodes_are_the_units():
    unit = made([], cpu=HYBRID | TWO_NODES)[0]
    values = {name: directive(unit, name) for name in ("CPUAffinity", "NUMAPolicy", "NUMAMask")}
    assert values == {"CPUAffinity": ["0-5,8"], "NUMAPolicy": ["interleave"], "NUMAMask": ["0-1"]}
    unit = made([])[0]
    assert not [name for name in values if directive(unit, name)]


@pytest.mark.parametrize("cpu", [HYBRID, TWO_NODES], ids=["cpus", "nodes"])
def test_other_cpus_or_nodes_are_another_identity(cpu):
    assert made([], cpu=cpu)[1]["identity"] != made([])[1]["identity"]


def test_a_certificate_is_a_credential_and_the_gate_speaks_https():
    unit, record, _ = made([], tls_certificate_file="/home/me/c", tls_key_file="/home/me/k")
    names = [line.split(":")[0] for line in directive(unit, "LoadCredential")]
    assert names == ["tls-certificate", "tls-key"] and "/home/me" not in unit
    assert record["gate"]["url"].startswith("https://") and record["gate"]["tls_certificate"].endswith(
        "/tls-certificate"
    )
