"""What has to be done: wanted against found. A host that is as wanted has nothing to do."""

import dataclasses

import pytest

from llamafleet.host.installed import Found, FoundInstance, Listener
from llamafleet.service.changes import Service, compare, differences, port_conflict, sha256

SERVICE = Service(
    name="demo", address="127.0.0.1", port=8080, unit_text="[Unit]\n", plan_json="{}", secrets={"api-keys": "secret\n"},
    argv=("/opt/llamafleet/releases/k1/bin/llama-server", "--port", "8080"), release="/opt/llamafleet/releases/k1",
    liveness={"llama-server-demo-liveness.timer": "[Timer]\n"},
)  # fmt: skip
GROUND = {"systemd": "257", "kernel": "6.12", "driver": None}
INSTANCE = FoundInstance(
    unit_sha256=sha256("[Unit]\n"), plan_sha256=sha256("{}"), secrets={"api-keys": sha256("secret\n")}, preflight=None,
    active="active", enabled="enabled", restarts=0, drop_ins=(), stale=False, pid=7, argv=SERVICE.argv, exe=SERVICE.argv[0],
    good_sha256=sha256("[Unit]\n"), liveness_sha256={"llama-server-demo-liveness.timer": sha256("[Timer]\n")}, liveness="active",
)  # fmt: skip
FOUND = Found(
    euid=0, user=True, missing_packages=(), helpers="h1", lock=None, releases={"k1": {}}, current="k1",
    cached_builds=(), models={"/m/f/a.gguf": "aa"}, instances={"demo": INSTANCE}, listeners=(), device_classes=(),
    ground=GROUND,
    toolkits=(), gpu_groups=(), foreign_units=(),
)  # fmt: skip


def work(found, **wanted):
    defaults = {"helpers": "h1", "key": "k1", "toolkit": False, "packages": (),
                "model_files": {"/m/f": {"/m/f/a.gguf": "aa"}}, "services": [SERVICE]}  # fmt: skip
    return compare(found, **{**defaults, **wanted})


def test_nothing_to_do():
    assert not work(FOUND).any


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"helpers": "h2"}, "helpers"),
        ({"key": "k2"}, "build"),
        ({"key": "k2"}, "current"),
        ({"toolkit": True}, "toolkit"),
        ({"packages": ("curl",)}, "packages"),
        ({"model_files": {"/m/f": {"/m/f/a.gguf": "bb"}}}, "models"),
        ({"model_files": {"/m/g": {"/m/g/a.gguf": None}}}, "models"),
        ({"services": []}, "removed"),
    ],
)
def test_each_wanted_change_is_work(change, part):
    found = work(FOUND, **change)
    assert getattr(found, part) and found.any


def test_a_model_without_known_checksum_is_done_when_verified_on_the_host():
    assert not work(FOUND, model_files={"/m/f": {"/m/f/a.gguf": None}}).any


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"unit_sha256": "x"}, "its unit differs"),
        ({"good_sha256": None}, "it has not passed the gate"),
        ({"plan_sha256": None}, "its plan.json is missing"),
        ({"secrets": {}}, "its API keys differ"),
        ({"drop_ins": ("/etc/systemd/system/x.d/a.conf",)}, "drop-ins change its unit: /etc/systemd/system/x.d/a.conf"),
        ({"enabled": "disabled"}, "it is disabled"),
        ({"active": "failed"}, "it is failed"),
        ({"argv": ("llama-server",)}, "it runs with other arguments"),
        ({"exe": "/usr/bin/llama-server"}, "it runs /usr/bin/llama-server"),
    ],
)
def test_each_difference_of_an_instance_is_named(change, reason):
    assert differences(SERVICE, dataclasses.replace(INSTANCE, **change), GROUND) == (reason,)


LOOSENED = {"rendered_sha256": sha256("[Unit]\n"), "unit_sha256": sha256("[Unit]\n#"), "ground": GROUND}


@pytest.mark.parametrize(
    ("installed", "preflight", "reasons"),
    [
        ("[Unit]\n#", LOOSENED, ()),
        ("[Unit]\n# by hand", LOOSENED, ("its unit differs",)),
        ("[Unit]\n#", {**LOOSENED, "rendered_sha256": sha256("[Old]\n")}, ("its unit differs",)),
        ("[Unit]\n#", None, ("its unit differs",)),
        (
            "[Unit]\n#",
            {**LOOSENED, "ground": {**GROUND, "kernel": "6.1"}},
            ("its sandbox was loosened under another kernel: the whole one is tried again",),
        ),
        # The whole sandbox works: what it stands on may change.
        ("[Unit]\n", {**LOOSENED, "ground": {}}, ()),
    ],
    ids=["as recorded", "edited", "of another unit", "not recorded", "new kernel", "nothing loosened"],
)
def test_a_unit_may_differ_by_what_its_preflight_dropped(installed, preflight, reasons):
    found = dataclasses.replace(
        INSTANCE, unit_sha256=sha256(installed), good_sha256=sha256(installed), preflight=preflight
    )  # fmt: skip
    assert differences(SERVICE, found, GROUND) == reasons


def test_a_missing_instance_is_not_installed():
    assert differences(SERVICE, None, GROUND) == ("it is not installed",)


def test_drift_of_free_bytes_in_the_plan_is_no_difference():
    # plan.json holds the ledger, which moves with every megabyte that others use.
    assert not differences(SERVICE, dataclasses.replace(INSTANCE, plan_sha256="other"), GROUND)


@pytest.mark.parametrize(
    ("address", "unit", "conflict"),
    [
        ("127.0.0.1", None, True),
        ("0.0.0.0", "nginx.service", True),
        ("::", None, True),
        ("127.0.1.2", None, False),
        ("127.0.0.1", "llama-server-demo.service", False),
        ("127.0.0.1", "llama-server-old.service", False),
        ("127.0.0.1", "llama-server-other.service", True),
    ],
)
def test_port_conflicts(address, unit, conflict):
    listener = Listener(address=address, port=8080, pid=9, process="nginx", unit=unit)
    other = Listener(address=address, port=8081, pid=9, process="nginx", unit=None)
    assert port_conflict(SERVICE, [other, listener], {"llama-server-old.service"}) == (listener if conflict else None)


def test_keys_are_in_no_representation():
    assert "secret" not in repr(SERVICE)


@pytest.mark.parametrize(
    "change", [{"liveness_sha256": {}}, {"liveness": "inactive"}, {"liveness_sha256": {"x.timer": "y"}}], ids=str
)
def test_a_liveness_check_is_mended_without_touching_the_server(change):
    changed = dataclasses.replace(FOUND, instances={"demo": dataclasses.replace(INSTANCE, **change)})
    found = work(changed)
    assert (found.liveness, dict(found.services)) == (("demo",), {}) and found.any


def test_a_liveness_check_comes_with_a_server_that_is_installed_anyway():
    changed = dataclasses.replace(
        FOUND, instances={"demo": dataclasses.replace(INSTANCE, active="failed", liveness="inactive")}
    )
    assert work(changed).liveness == () and work(changed).services
    assert work(dataclasses.replace(FOUND, instances={})).liveness == ()


def test_no_liveness_check_is_wanted():
    none = dataclasses.replace(SERVICE, liveness={})
    there = dataclasses.replace(INSTANCE, liveness="inactive")
    assert work(dataclasses.replace(FOUND, instances={"demo": there}), services=[none]).liveness == ("demo",)
    gone = dataclasses.replace(there, liveness_sha256={})
    assert not work(dataclasses.replace(FOUND, instances={"demo": gone}), services=[none]).any
