"""What must change: what a host should be against what is installed. Nothing, where it is as it should be."""

import dataclasses

import pytest

from llamafleet.build.packages import all_needs
from llamafleet.build.release import Build
from llamafleet.host.installed import Installed, InstalledInstance, Place
from llamafleet.host.recorded import PlanRecord
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.remote.common import core_of_unit, identity_of, without_directives
from llamafleet.service import wanted
from llamafleet.service.building import Run
from llamafleet.service.changes import changes_needed
from llamafleet.service.desired import Desired, Service, Serving
from llamafleet.service.instance_changes import differences, sha256
from tests import planning

BUILD = Build(commit="c" * 40, backend="cpu", toolkit=None, architectures=(), machine_arch="x86_64", libc="2.41",
              cpu_flags=(), kv_types=("f16",), ui=False, tls=False)  # fmt: skip
RECORD = {"schema": 1, "name": "demo", "source": "hf:a/b/demo.gguf", "allowed_drop_ins": []}
RECORD["identity"] = identity_of(RECORD)
SERVICE = Service(
    name="demo", unit_text="[Unit]\n", plan_json="{}", secrets={"api-keys": "secret\n"},
    argv=(f"{BUILD.release}/bin/llama-server", "--port", "8080"), release=BUILD.release,
    liveness={"llama-server-demo-liveness.timer": "[Timer]\n"}, identities=frozenset([RECORD["identity"]]),
)  # fmt: skip
GROUND = {"systemd": "257", "kernel": "6.12", "driver": None}
INSTANCE = InstalledInstance(
    unit_sha256=sha256("[Unit]\n"), plan_sha256=sha256("{}"), secrets={"api-keys": sha256("secret\n")}, preflight=None,
    active="active", enabled="enabled", restarts=0, drop_ins=(), stale=False, pid=7, argv=SERVICE.argv, exe=SERVICE.argv[0],
    good_sha256=sha256("[Unit]\n"), liveness_sha256={"llama-server-demo-liveness.timer": sha256("[Timer]\n")}, liveness="active",
    good_liveness_sha256={"llama-server-demo-liveness.timer": sha256("[Timer]\n")}, good_plan_sha256=sha256("{}"), record=PlanRecord.of(RECORD),
)  # fmt: skip
FOLDERS = {place.path: Place(place.kind, place.mode, 0, 0) for place in wanted.folders()}
FILE = "/var/lib/llamafleet/models/a-aaaaaaaaaaaa/a.gguf"
INSTALLED = Installed(
    euid=0, user=True, missing_packages=(), helpers="h1", lock=None, releases={BUILD.key: {}}, current=BUILD.key,
    cached_builds={}, models={FILE: "a" * 64}, instances={"demo": INSTANCE}, listeners=(), device_classes=(),
    ground=GROUND, toolkits=(), gpu_groups=(), foreign_units=(), paths=FOLDERS,
)  # fmt: skip


class Inputs:
    """Of the plans' inputs what the changes depend on: which records were planned from those of now."""

    def __init__(self, *names):
        self.names = names

    def same_inputs(self):
        return {name: {} for name in self.names}


def serving(service=SERVICE, sha256="a" * 64, asked=True, verified=None):
    """An instance of that service; `asked`: llama-server was asked about its plan; `verified`: in this run."""
    (instance,) = planning.settings({"name": service.name}).models
    model = ModelFiles((RemoteFile("a.gguf", "https://x/a", 5, sha256),), planning.header("Qwen3-8B"))
    return Serving(
        instance,
        model,
        plan=None,
        service=service,
        record={**RECORD, "verified": {} if asked else None},
        verified=verified,
    )


def changes(installed=INSTALLED, inputs=Inputs("demo"), servings=None, **wanted):
    """What must change where `wanted` differs from a host as it should be."""
    run = Run(helpers=wanted.pop("helpers", "h1"), oldest_python=(3, 9), commit="c" * 40, secrets={}, holder=None)
    defaults = {"build": BUILD, "install_toolkit": None, "lacking": (), "servings": servings or (serving(),)}
    return changes_needed(Desired(inputs, run, **{**defaults, **wanted}), installed)


def test_nothing_to_do():
    needed = changes()
    assert not needed.any and needed.verify == needed.note == ()


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ({"helpers": "h2"}, "helpers"),
        ({"build": dataclasses.replace(BUILD, libc="2.36")}, "build"),
        ({"build": dataclasses.replace(BUILD, libc="2.36")}, "current"),
        ({"install_toolkit": "a toolkit"}, "toolkit"),
        ({"lacking": (all_needs()["curl"],)}, "packages"),
        ({"servings": (serving(sha256="b" * 64),)}, "models"),
        ({"servings": (serving(dataclasses.replace(SERVICE, name="other")),)}, "removed"),
    ],
)
def test_each_difference_of_the_host_is_a_change(wanted, part):
    needed = changes(**wanted)
    assert getattr(needed, part) and needed.any


def test_a_missing_user_is_a_change():
    assert changes(dataclasses.replace(INSTALLED, user=False)).user


def test_a_model_without_known_checksum_is_complete_when_the_host_verified_it():
    unknown = serving(sha256=None)
    assert list(changes(servings=(unknown,)).models) == [unknown.folder]
    there = dataclasses.replace(INSTALLED, models={f"{unknown.folder}/a.gguf": "b" * 64})
    assert not changes(there, servings=(unknown,)).models


def test_a_plan_is_verified_before_it_is_installed_and_once():
    stopped = dataclasses.replace(INSTALLED, instances={"demo": dataclasses.replace(INSTANCE, active="failed")})
    assert changes(stopped, servings=(serving(asked=False),)).verify == ("demo",)
    assert changes(stopped, servings=(serving(asked=True),)).verify == ()
    assert changes(servings=(serving(asked=False),)).verify == ()  # it runs on as it is


def test_the_record_of_a_service_that_stays_is_noted_for_other_inputs_or_a_new_answer():
    assert changes(inputs=Inputs()).note == ("demo",)
    assert changes(servings=(serving(verified="an answer"),)).note == ("demo",)
    assert not changes(inputs=Inputs()).any
    stopped = dataclasses.replace(INSTALLED, instances={"demo": dataclasses.replace(INSTANCE, active="failed")})
    assert changes(stopped, inputs=Inputs()).note == ()  # the switch brings the new record


def test_a_record_that_has_the_query_of_an_address_is_written_again():
    """Everybody on the host may read it, and a query may be a signature."""
    records = [{**RECORD, "source": f"https://x/a.gguf{query}"} for query in ("?Signature=1", "")]
    earlier, now = ({**record, "identity": identity_of(record)} for record in records)
    service = dataclasses.replace(SERVICE, identities=frozenset((earlier["identity"], now["identity"])))
    asked = dataclasses.replace(serving(service), record={**now, "verified": {}})
    for record, note in ((earlier, ("demo",)), (now, ())):
        installed = dataclasses.replace(INSTANCE, record=PlanRecord.of(record))
        needed = changes(dataclasses.replace(INSTALLED, instances={"demo": installed}), servings=(asked,))
        assert needed.note == note and not needed.any


DROP_INS = f"/etc/systemd/system/{SERVICE.unit}.d"
EDITED = PlanRecord.of({**RECORD, "name": "other"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"plan_sha256": None}, "its plan.json is missing"),
        ({"good_plan_sha256": sha256("other")}, "its plan.json was edited or damaged"),
        ({"record": None}, "its plan.json cannot be read"),
        ({"record": EDITED}, "its plan.json was edited"),
        ({"record": PlanRecord.of({**EDITED.raw, "identity": identity_of(EDITED.raw)})}, "its plan.json was edited"),
        ({"secrets": {}, "loaded": {"api-keys": sha256("secret\n")}}, "its API keys differ"),
        (
            {"unread_drop_ins": (f"{DROP_INS}/a.conf",), "stale": True},
            f"drop-ins would change its unit at its next start: {DROP_INS}/a.conf",
        ),
        ({"stale": True}, "systemd has not read its unit again since a file of it changed"),
        ({"enabled": "disabled"}, "it is disabled"),
        ({"good_sha256": None}, "the files to go back to are damaged or missing"),
        ({"good_is_whole": False}, "the files to go back to are damaged or missing"),
        ({"good_liveness_sha256": {}}, "the files to go back to are damaged or missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_no_restart_is_named_and_set_right_while_the_server_runs(change, reason):
    there = dataclasses.replace(INSTALLED, instances={"demo": dataclasses.replace(INSTANCE, **change)})
    needed = changes(there)
    assert needed.any and not needed.services and dict(needed.refreshed) == {"demo": (reason,)}
    assert needed.of_instance("demo") == (reason,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"unit_sha256": "x"}, "its unit differs"),
        ({"unit_sha256": None}, "its unit is missing"),
        ({"good_sha256": "x"}, "it has not passed the gate"),
        ({"secrets": {}}, "its API keys differ"),
        ({"loaded": {"api-keys": "x"}}, "its API keys differ from what it runs with"),
        ({"drop_ins": (f"{DROP_INS}/a.conf", "/etc/systemd/system/service.d/b.conf")},
         f"drop-ins change its unit: {DROP_INS}/a.conf"),
        ({"active": "failed"}, "it is failed"),
        ({"argv": ("llama-server",)}, "it runs with other arguments"),
        ({"exe": "/usr/bin/llama-server"}, "it runs /usr/bin/llama-server"),
    ],
)  # fmt: skip
def test_each_difference_of_an_instance_is_named(change, reason):
    assert differences(SERVICE, dataclasses.replace(INSTANCE, **change), GROUND) == (reason,)


UNIT = """\
# Made by llamafleet, plan 1
[Unit]
Description=a server
[Service]
ExecStart=/r/bin/llama-server \\
    --port 8080
ExecStartPost=+/usr/bin/python3 /opt/llamafleet/helpers/k2/gate.py start
PrivateUsers=yes
MemoryDenyWriteExecute=yes
"""
CODE, USERS = "MemoryDenyWriteExecute=yes", "PrivateUsers=yes"
WANTED = dataclasses.replace(SERVICE, unit_text=UNIT)


def with_unit(text, dropped=(), ground=GROUND, good=None):
    """The instance with this unit; its preflight dropped these directives on that ground."""
    found = {"dropped": [{"directives": list(dropped), "why": "it breaks"}], "ground": ground}
    good = text if good is None else good
    return dataclasses.replace(
        INSTANCE, preflight=found,
        unit_sha256=sha256(text), unit_core_sha256=sha256(core_of_unit(text)),
        good_sha256=sha256(good), good_core_sha256=sha256(core_of_unit(good)),
    )  # fmt: skip


def loosened(*dropped):
    return without_directives(UNIT, dropped)


NEW_KERNEL = "its hardening was loosened under another kernel: the whole hardening is tried again"
OTHER_GROUND = {**GROUND, "kernel": "6.1"}


@pytest.mark.parametrize(
    ("installed", "alone", "reasons"),
    [
        (with_unit(UNIT), True, ()),
        (with_unit(loosened(CODE), [CODE]), True, ()),
        (with_unit(loosened(CODE)), True, ("its unit differs",)),
        (with_unit(loosened(CODE), [USERS]), True, ("its unit differs",)),
        (with_unit(UNIT.replace("yes\n", "no\n", 1)), True, ("its unit differs",)),
        (with_unit(UNIT.replace("8080", "8081")), True, ("its unit differs",)),
        (with_unit(loosened(CODE), [CODE], OTHER_GROUND), True, (NEW_KERNEL,)),
        # Nothing was dropped: systemd, kernel and driver may change.
        (with_unit(UNIT, ground={}), True, ()),
        (with_unit(loosened(USERS), [USERS]), True, ()),
        (with_unit(loosened(USERS), [USERS]), False,
         ("its hardening lacks PrivateUsers, which keeps it apart from the host's other instances",)),
        (dataclasses.replace(with_unit(loosened(CODE)), record=PlanRecord(raw={"preflight": [5]})), True, ("its unit differs",)),
        (dataclasses.replace(with_unit(loosened(CODE)), preflight={"dropped": 7}), True, ("its unit differs",)),
    ],
    ids=["as wanted", "as recorded", "not recorded", "another one recorded", "loosened by hand", "edited", "new kernel",
         "nothing loosened", "alone", "not alone", "a list", "a number"],
)  # fmt: skip
def test_a_unit_may_differ_by_what_its_preflight_dropped(installed, alone, reasons):
    assert differences(WANTED, installed, GROUND, alone) == reasons


# As 39f1a14 made it: by the helpers' link, without what came later.
OLDER = UNIT.replace("helpers/k2", "helpers/current")
QUIET = ("its unit differs in lines that need no restart",)


@pytest.mark.parametrize(
    ("installed", "quiet"),
    [
        (with_unit(UNIT), ()),
        (with_unit(OLDER), QUIET),
        (with_unit(without_directives(OLDER, [CODE]), [CODE]), QUIET),
        (with_unit(loosened(CODE), [CODE]), ()),
        (with_unit(UNIT.replace("a server", "my server")), QUIET),
        (with_unit(UNIT + "# a remark\n"), QUIET),
        (
            with_unit(UNIT.replace("ExecStartPost=+/usr/bin/python3 /opt/llamafleet/helpers/k2/gate.py start\n", "")),
            QUIET,
        ),
    ],
    ids=["as wanted", "earlier helpers", "and loosened", "loosened", "description", "comment", "no start check"],
)
def test_a_unit_that_differs_in_quiet_lines_is_refreshed_while_its_server_runs_on(installed, quiet):
    assert differences(WANTED, installed, GROUND) == () == differences(WANTED, installed, GROUND, alone=False)
    needed = changes(dataclasses.replace(INSTALLED, instances={"demo": installed}), servings=(serving(WANTED),))
    assert dict(needed.refreshed) == ({"demo": quiet} if quiet else {})
    assert not needed.services and needed.any is bool(quiet)
    # The refresh brings its liveness check and its record too.
    stopped = dataclasses.replace(installed, liveness="inactive")
    needed = changes(
        dataclasses.replace(INSTALLED, instances={"demo": stopped}), servings=(serving(WANTED),), inputs=Inputs()
    )
    assert (list(needed.liveness), needed.note) == (([], ()) if quiet else (["demo"], ("demo",)))


def test_a_refresh_that_was_cut_off_does_not_make_the_unit_an_unproven_one():
    assert differences(WANTED, with_unit(UNIT, good=OLDER), GROUND) == ()
    other = UNIT.replace("8080", "8081")
    assert differences(WANTED, with_unit(UNIT, good=other), GROUND) == ("it has not passed the gate",)


def test_a_comment_that_ends_in_a_backslash_hides_no_directive():
    edited = UNIT + "# remark \\\nUser=root\n"
    assert differences(WANTED, with_unit(edited), GROUND) == ("its unit differs",)


def test_a_missing_instance_is_not_installed():
    assert differences(SERVICE, None, GROUND) == ("it is not installed",)


def test_drift_of_free_bytes_in_the_plan_is_no_difference():
    # plan.json holds the ledger, which moves with every megabyte that others use.
    assert not differences(SERVICE, dataclasses.replace(INSTANCE, plan_sha256="other"), GROUND)


def test_keys_are_in_no_representation():
    assert "secret" not in repr(SERVICE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"liveness_sha256": {}}, "its liveness check differs"),
        ({"liveness_sha256": {"x.timer": "y"}}, "its liveness check differs"),
        ({"liveness": "inactive"}, "its liveness timer is inactive"),
        ({"liveness_enabled": "disabled"}, "its liveness timer is disabled"),
        ({"liveness_drop_ins": ("/x.conf",)}, "drop-ins change its liveness check: /x.conf"),
    ],
)
def test_a_liveness_check_is_mended_without_touching_the_server(change, reason):
    needed = changes(dataclasses.replace(INSTALLED, instances={"demo": dataclasses.replace(INSTANCE, **change)}))
    assert dict(needed.liveness) == {"demo": (reason,)} and not needed.services and needed.any
    assert needed.of_instance("demo") == (reason,)


def test_a_liveness_check_comes_with_a_server_that_is_installed_anyway():
    failed = dataclasses.replace(INSTANCE, active="failed", liveness="inactive")
    needed = changes(dataclasses.replace(INSTALLED, instances={"demo": failed}))
    assert not needed.liveness and needed.services
    assert not changes(dataclasses.replace(INSTALLED, instances={})).liveness


def test_no_liveness_check_is_wanted():
    servings = (serving(dataclasses.replace(SERVICE, liveness={})),)
    there = dataclasses.replace(INSTANCE, liveness="inactive")
    needed = changes(dataclasses.replace(INSTALLED, instances={"demo": there}), servings=servings)
    assert list(needed.liveness) == ["demo"]
    gone = dataclasses.replace(there, liveness_sha256={}, good_liveness_sha256={})
    assert not changes(dataclasses.replace(INSTALLED, instances={"demo": gone}), servings=servings).any


# --- places -----------------------------------------------------------------------------------------


def test_a_release_that_is_made_again_restarts_what_runs_from_it():
    needed = changes(dataclasses.replace(INSTALLED, releases={}))
    assert needed.build and dict(needed.services) == {"demo": ("its release is damaged and made again",)}
    elsewhere = dataclasses.replace(INSTANCE, deleted=(f"{BUILD.release}/bin/libllama.so",))
    needed = changes(dataclasses.replace(INSTALLED, instances={"demo": elsewhere}))
    reason = "it runs from files that were removed or replaced: libllama.so"
    assert not needed.build and dict(needed.services) == {"demo": (reason,)}


def test_a_release_whose_record_is_of_another_commit_is_made_again():
    assert changes(dataclasses.replace(INSTALLED, releases={BUILD.key: {"commit": "d" * 40}})).build
    assert not changes(
        dataclasses.replace(INSTALLED, releases={BUILD.key: {"commit": "c" * 40, "key": BUILD.key}})
    ).build


def test_allowed_drop_ins_are_no_drift_and_others_are():
    service = dataclasses.replace(SERVICE, allowed_drop_ins=("nice.conf",))
    both = tuple(f"{DROP_INS}/{name}.conf" for name in ("nice", "port"))
    assert differences(service, dataclasses.replace(INSTANCE, drop_ins=both[:1]), GROUND) == ()
    assert differences(service, dataclasses.replace(INSTANCE, drop_ins=both), GROUND) == (
        f"drop-ins change its unit: {both[1]}",
    )


MODEL = serving().folder + "/a.gguf"


@pytest.mark.parametrize(
    ("models", "paths", "reason"),
    [
        ({}, {}, "is missing"),
        ({}, {MODEL: Place("file", 0o644, 0, 0)}, "was changed since it was verified"),
        ({}, {MODEL: Place("file", 0o600, 0, 0)}, "has mode 0600 instead of 0644"),
        ({MODEL: "a" * 64}, {MODEL: Place("link", 0o777, 0, 0)}, "is a link instead of a file"),
        ({MODEL: "b" * 64}, {MODEL: Place("file", 0o644, 0, 0)}, "is another file than the source has"),
    ],
)
def test_why_a_model_is_fetched_or_read_again(models, paths, reason):
    needed = changes(dataclasses.replace(INSTALLED, models=models, paths={**FOLDERS, **paths}))
    assert dict(needed.models) == {serving().folder: (f"{MODEL} {reason}",)} and not needed.paths
    assert needed.of_host() == (f"models: {MODEL} {reason}",)
