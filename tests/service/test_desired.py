"""What a host should be, decided offline: each reason to leave it out with its whole message, and that deciding is pure."""

import dataclasses
import json
import sys

import pytest

from llamafleet.build.cuda_toolkit import Install
from llamafleet.host.installed import Holder, Listener, Offer, Place, Survey
from llamafleet.host.left import Left, Space
from llamafleet.host.recorded import PlanRecord
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.planner.reconcile import Verified
from llamafleet.planner.result import Refusal
from llamafleet.remote.common import MODELS
from llamafleet.service import refusals
from llamafleet.service.building import Run
from llamafleet.service.changes import changes_needed
from llamafleet.service.desired import Desired, desire, to_ask, with_plans
from llamafleet.service.instance_changes import CREDENTIALS
from llamafleet.service.model_folders import mount_of, stored_at
from llamafleet.service.plan_inputs import plan_inputs
from llamafleet.service.refusals import Refused, port_taken
from tests import planning
from tests.hosts import instance_checks
from tests.service.test_changes import FOLDERS, INSTALLED, INSTANCE

RUN = Run(helpers="h1", oldest_python=(3, 9), commit="c" * 40, secrets={}, holder=None)
SYSTEM = {"package_manager": "apt", "python": "3.13.5"}
AMD = {"vendor": "amd", "compute_capability": None, "gfx": "gfx1100", "name": "Radeon RX 7900 XTX"}
HOLDER = Holder(run="1", who="ann@desk", pid=12, began="2026-11-29 10:00:00 UTC", age_seconds=3.2)


def survey(gpus=(), machine=None, **installed):
    """A host that may be deployed to, but for what is given; nothing of ours is installed there."""
    bare = dataclasses.replace(INSTALLED, releases={}, current=None, models={}, instances={})
    return Survey(planning.machine(gpus, **{**SYSTEM, **(machine or {})}), dataclasses.replace(bare, **installed))


def reading(read=None, models=({},), header="Qwen3-8B", **asked):
    """What was read: settings, host and models. `models` are entries of the setting."""
    settings = planning.settings(
        *({"source": "hf:a/b/m.gguf", "context_tokens": 4096, **one} for one in models), **asked
    )
    file = RemoteFile("m.gguf", "https://x/m.gguf", 5, "a" * 64)
    files = {one.name: ModelFiles((file,), planning.header(header)) for one in settings.models if one.source[0] != "/"}
    return settings, read or survey(), files


def decide(settings, read, files, run=RUN):
    inputs = plan_inputs(settings, read, files)
    return inputs if isinstance(inputs, Refused) else desire(inputs, run, lambda template, values: template)


def decided(read=None, run=RUN, **asked):
    return decide(*reading(read, **asked), run)


def refusal(*arguments, **asked):
    """The whole message."""
    outcome = decided(*arguments, **asked)
    assert isinstance(outcome, Refused), outcome
    return str(outcome)


# --- refusals: whether our programs can work there ------------------------------------------------


def test_an_ordinary_user():
    assert refusal(survey(euid=1000)) == (
        "commands run there as an ordinary user: connect as root (ssh_user), or set `_sudo = True` for the host in the "
        "inventory, or pass --sudo"
    )


@pytest.mark.parametrize(("python", "shown"), [("3.8.10", "3.8.10"), (None, "of unknown version")])
def test_a_python_that_is_too_old(python, shown):
    assert refusal(survey(machine={"python": python})) == (
        f"its Python is {shown}, 3.9 or later is needed: install a newer one, and name it in the setting python, such as "
        'python = "/usr/bin/python3.11"'
    )


def test_a_package_manager_that_is_not_known():
    assert refusal(survey(machine={"package_manager": None})) == (
        "debian 13 has none of the package managers that llamafleet knows: apt, dnf, zypper or pacman"
    )


def test_another_run_holds_the_lock():
    assert refusal(run=dataclasses.replace(RUN, holder=HOLDER)) == (
        "ann@desk (pid 12) is deploying to this host since 2026-11-29 10:00:00 UTC, last seen 3 s ago: wait for it; "
        "a run that died elsewhere loses the lock after 15 minutes, or remove /run/llamafleet/lock.json"
    )


def test_a_later_version_deployed_the_host():
    """Also where the inventory no longer names the instance."""
    later = dataclasses.replace(INSTANCE, record=PlanRecord.of({"schema": 2}))
    assert refusal(survey(instances={"old": later})) == (
        "/etc/llamafleet/instances/old/plan.json on the host has schema 2, this version of llamafleet knows 1: deploy "
        "with the later version that wrote it, or remove the file to have old planned anew"
    )


PROBLEM = "NVIDIA: module 570 is loaded but the libraries are 580: reboot needed"


@pytest.mark.parametrize("asked", [{}, {"backend": "cuda"}], ids=["no_python", "no_gpu"])
def test_every_refusal_has_what_the_probe_found_wrong(asked):
    """lyulyul/shine-cluster#30, NVIDIA/ubuntu-packaging-nvidia-driver#3: the operator read something else."""
    host = survey(machine={"python": None, "problems": [PROBLEM]})
    outcome = decided(host, **asked)
    assert isinstance(outcome, Refused) and outcome.reasons[-1] == f"the host: {PROBLEM}"


def test_a_plan_that_is_refused_says_once_what_is_wrong_with_the_host():
    lost = {"pci_bus_id": "0000:01:00.0", "vendor": "nvidia", "device_id": "0x2684", "name": "NVIDIA GPU 0x2684",
            "problem": PROBLEM}  # fmt: skip
    text = refusal(survey(machine={"pci_gpus": [lost], "problems": [PROBLEM]}))
    assert f"NVIDIA GPU 0x2684 at 0000:01:00.0: {PROBLEM}" in text and text.count("reboot needed") == 1
    assert text.count("reboot needed") == refusal(survey(machine={"problems": [PROBLEM]}), backend="cuda").count(
        "reboot"
    )


def test_a_run_says_what_is_wrong_with_a_host_that_is_planned():
    assert decided(survey(machine={"problems": [PROBLEM]})).inputs.notes == (f"the host: {PROBLEM}",)


def test_what_is_compiled_is_for_the_gpus_that_are_used():
    """A card that `gpus` leaves out may be too old for the toolkit."""
    toolkits = survey([{"compute_capability": "5.0"}, {}])
    assert decided(toolkits, gpus=[1]).build.architectures == ("89",)
    cards = survey([{**AMD, "unified_memory": True, "gfx": "gfx1036"}, AMD])
    assert decided(cards).build.architectures == ("gfx1100",)


# --- refusals: what was asked for -----------------------------------------------------------------


def test_a_plan_that_does_not_fit_names_the_model_once():
    text = refusal(survey(machine={"ram_gib": 4}))
    assert text == (
        "models: m0: Qwen3-8B with 4096 tokens for each of 1 slot(s) does not fit on box1: 6703 MiB of RAM needed, "
        "2048 MiB available besides the reserve, 4656 MiB missing; the weights alone need 4789 MiB, all devices together have 2048 MiB"
    )


def test_a_host_whose_models_are_gone_from_the_inventory_is_not_emptied():
    serving = dataclasses.replace(survey(), installed=INSTALLED)
    assert INSTALLED.instances
    text = refusal(serving, models=())
    assert text.startswith("models: is empty, and the host serves ") and all(one in text for one in INSTALLED.instances)
    assert "allow_empty_models = True" in text and "tasks.uninstall.uninstall" in text
    assert decided(serving, models=(), allow_empty_models=True).servings == ()
    assert decided(survey(), models=()).servings == ()  # a host without instances
    moved = dataclasses.replace(RUN, elsewhere=frozenset(INSTALLED.instances))
    assert decided(serving, moved, models=()).servings == ()


@pytest.mark.parametrize("reason", ["m0: m0: llama.cpp does not know it", "m0: llama.cpp does not know it"])
def test_a_model_of_its_instance_s_name_is_named_once(reason):
    assert str(refusals.no_plan(Refusal(reason, instance="m0"))) == "models: m0: llama.cpp does not know it"


def test_of_several_models_the_refused_one_is_named():
    assert refusal(survey(machine={"ram_gib": 10}), models=({}, {})).startswith("models: m1: Qwen3-8B with 4096 tokens")


def test_a_backend_without_a_gpu():
    assert refusal(backend="cuda") == (
        'models: m0: backend is \'cuda\' but box1 has no GPU that this backend can use; set backend = "auto" or "cpu"'
    )


def test_a_gpu_that_cannot_be_used_is_not_passed_over():
    assert refusal(survey([{"problem": "fallen off the bus"}])) == (
        "the host: box1 has a GPU that cannot be used: GPU0 (NVIDIA GeForce RTX 4090): fallen off the bus; set "
        'backend = "cpu" to use no GPU, or name the GPUs to use in gpus'
    )


def test_gpus_of_several_vendors():
    assert refusal(survey([{}, AMD])) == (
        'the host: box1 has usable GPUs of several vendors (amd, nvidia); set backend to "cuda", "hip" or "vulkan", '
        "or name the GPUs to use in gpus"
    )


def test_no_driver_for_cuda():
    assert refusal(survey([{}], {"driver": {"nvidia": None, "cuda": None}})) == (
        "cuda_toolkit: no NVIDIA driver answers on this host; install NVIDIA's driver and restart the host; or set "
        'backend = "vulkan" or "cpu"'
    )


def test_no_cuda_toolkit_that_fits():
    exotic = {"os": {"id": "exotic", "version": "1", "arch": "x86_64", "libc": "2.41"}}
    assert refusal(survey([{}], exotic)) == (
        "cuda_toolkit: no CUDA toolkit fits this host: NVIDIA has no package repository for exotic 1 x86_64; exotic 1 "
        "x86_64 has no CUDA toolkit of its own; install a toolkit that fits and name its folder: cuda_toolkit = "
        '"/usr/local/cuda-X.Y"; or update the driver (it is 580.159.04, for CUDA 13.0); or set backend = "vulkan"'
    )


def test_hip_without_the_gpus_target():
    assert refusal(survey([{**AMD, "gfx": None}])) == (
        "backend: hip: the driver does not report the GPU's LLVM target (gfx...): amdgpu's KFD is not loaded, or a "
        'container was not given /dev/kfd: mend that, or set backend = "vulkan"'
    )


# --- refusals: checksums ----------------------------------------------------------------------------

URL = "https://x/m-00001-of-00002.gguf"
FOLDER = f"{MODELS}/m-00001-of-00002"
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def shards(*sums, failed=""):
    names = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    return tuple(
        RemoteFile(name, f"https://x/{name}?Signature=SECRET", 5, one, failed=failed)
        for name, one in zip(names, sums, strict=True)
    )


def of_shards(files, installed=None, **entry):
    """What comes of a model of these files on a host that has verified these, by path."""
    settings = planning.settings({"source": URL, "context_tokens": 4096, **entry})
    model = ModelFiles(files, planning.header("Qwen3-8B"))
    return decide(settings, survey(models=installed or {}), {"m0": model})


def test_a_file_without_a_known_sum_is_not_downloaded():
    """Shards 2 to N of a plain URL were unchecked even where `sha256` was set."""
    assert str(of_shards(shards(A, None))) == (
        "models: m0: sha256: it is not known of m-00002-of-00002.gguf from https://x/m-00002-of-00002.gguf, so anybody "
        "between could give another file: give a list with one for each of the 2 files, or set `allow_unverified` = True in "
        "this model's entry"
    )
    assert "m-00001-of-00002.gguf and 1 more from" in str(of_shards(shards(None, None)))


def test_a_mirror_without_a_sum_is_refused_with_the_cause():
    text = str(of_shards(shards(None, None, failed="https://hub/x: HTTP 503")))
    assert text.endswith("this model's entry. The source was not read: https://hub/x: HTTP 503")


def test_the_operator_may_say_that_a_model_may_do_without():
    outcome = of_shards(shards(None, None), allow_unverified=True)
    assert isinstance(outcome, Desired) and outcome.inputs.notes == ()


def test_what_a_host_verified_earlier_is_served_on_and_said():
    """Deployed by a version that asked for no sums: neither refused nor downloaded, nor started again."""
    folder = f"{MODELS}/{ModelFiles(shards(None, None), planning.header('Qwen3-8B')).folder}"
    there = {f"{folder}/m-0000{n}-of-00002.gguf": one for n, one in ((1, B), (2, C))}
    outcome = of_shards(shards(None, None), there)
    assert not changes_needed(outcome, outcome.installed).models
    assert outcome.inputs.notes == (
        "models: m0: sha256 is not known of m-00001-of-00002.gguf, m-00002-of-00002.gguf: served on as the host verified it "
        f"earlier, and not to be downloaded again; set sha256 ({B} by the host itself, ...)",
    )
    for path in there:  # one is gone, or has changed
        assert "it is not known of" in str(of_shards(shards(None, None), {**there, path: None}))
    assert "it is not known of" in str(of_shards(shards(None, None), {f"{MODELS}/other/{name}": B for name in there}))


def test_sums_that_become_known_move_no_file():
    """The folder is named by address and size where no sum was known; by the first sum where one is."""
    header = planning.header("Qwen3-8B")
    old, new = (f"{MODELS}/{ModelFiles(files, header).folder}" for files in (shards(None, None), shards(B, C)))
    there = {f"{folder}/m-0000{n}-of-00002.gguf": one for folder in (old, new) for n, one in ((1, B), (2, C))}
    only_old = {path: one for path, one in there.items() if path.startswith(old)}
    assert old != new and of_shards(shards(B, C), only_old).servings[0].folder == old
    assert of_shards(shards(B, C), there).servings[0].folder == new
    assert of_shards(shards(B, A), only_old).servings[0].folder == new, "another file than the settings name"


def deployed(files):
    """A host that serves these files, of which it verified both shards: the model's folder, the service, and what is
    decided there for other files."""
    header = planning.header("Qwen3-8B")
    folder = f"{MODELS}/{ModelFiles(files, header).folder}"
    there = {f"{folder}/m-0000{n}-of-00002.gguf": one for n, one in ((1, B), (2, C))}
    before = of_shards(files, there).servings[0].service
    record = PlanRecord.of(json.loads(before.plan_json))
    read = survey(models=there, instances={"m0": dataclasses.replace(INSTANCE, record=record)})
    settings = planning.settings({"source": URL, "context_tokens": 4096})
    return folder, before, lambda files: decide(settings, read, {"m0": ModelFiles(files, header)})


def test_sums_that_become_known_start_no_server_again():
    _, before, now = deployed(shards(None, None))
    outcome = now(shards(B, C))
    after = outcome.servings[0].service
    assert (after.identity, after.argv, after.unit_text) == (before.identity, before.argv, before.unit_text)
    assert list(outcome.inputs.same_inputs()) == ["m0"], "it would be planned anew"


def test_a_sum_that_does_not_fit_is_another_model():
    """Shard 2 had no sum, and the settings now name another file: it is downloaded, and the service starts with it."""
    folder, before, now = deployed(shards(B, None))
    same, other = (now(shards(B, sum_)) for sum_ in (C, A))
    assert same.servings[0].service.identity == before.identity != other.servings[0].service.identity
    assert (
        list(changes_needed(other, other.installed).models) == [folder]
        and not changes_needed(same, same.installed).models
    )


# --- plan.json ----------------------------------------------------------------------------------------


def test_a_query_is_not_in_plan_json_and_the_service_is_the_same():
    """The query of a signed address is a secret, and everybody on the host may read plan.json."""
    signed = "https://x/m.gguf?Signature=SECRET"
    settings = planning.settings({"source": signed, "context_tokens": 4096})
    files = {"m0": ModelFiles((RemoteFile("m.gguf", signed, 5, A),), planning.header("Qwen3-8B"))}
    outcome = decide(settings, survey(), files)
    record = outcome.servings[0].record
    assert "SECRET" not in outcome.servings[0].service.plan_json and record["source"] == "https://x/m.gguf"
    assert instance_checks.identity_of(record) == record["public_identity"] != record["identity"]
    assert outcome.servings[0].service.identities == {record["public_identity"], record["identity"]}
    # One that an earlier version wrote has the query: it is written again, and the service stays as it is.
    earlier = {key: value for key, value in record.items() if key != "public_identity"} | {"source": signed}
    assert instance_checks.identity_of(earlier) == record["identity"]


@pytest.mark.parametrize(
    "name", ["a\nb.gguf", "m;touch${IFS}x;.gguf", "../m.gguf", "-m.gguf", "m", "m" * 250 + ".gguf"]
)
def test_a_file_name_that_no_host_may_store(name):
    model = ModelFiles((RemoteFile(name, "https://x/m.gguf", 5, "a" * 64),), planning.header("Qwen3-8B"))
    outcome = plan_inputs(planning.settings({"source": "hf:a/b/c.gguf"}), survey(), {"m0": model})
    assert str(outcome) == (
        f"models: m0: source: the file name {name[:250]!r} should have letters, digits and . _ + = - only, a letter, "
        "digit or _ first, .gguf last, 206 characters at most"
    )


# --- refusals: what is in the way there -----------------------------------------------------------


def test_a_unit_of_our_name_that_we_did_not_make():
    assert refusal(survey(foreign_units=("llama-server-m0.service",))) == (
        "models: m0: llama-server-m0.service exists and llamafleet did not make it: give the model another name, or "
        "remove the unit"
    )


PREFIX_DROP_IN = "/etc/systemd/system/llama-server-.service.d/x.conf"


@pytest.mark.parametrize(
    ("path", "allowed", "refused"),
    [
        (PREFIX_DROP_IN, [], True),
        (PREFIX_DROP_IN, ["x.conf"], False),
        ("/usr/lib/systemd/system/llama-server-m0.service.d/x.conf", [], True),
        ("/etc/systemd/system/service.d/x.conf", [], False),  # of all services: the host's
        ("/etc/systemd/system/llama-server-m0.service.d/x.conf", [], False),  # a run removes it
        ("/run/systemd/system.control/llama-server-m0.service.d/50-x.conf", [], False),
    ],
)
def test_a_drop_in_that_is_not_the_unit_s_own(path, allowed, refused):
    there = dataclasses.replace(INSTANCE, drop_ins=(path,))
    outcome = decided(survey(instances={"m0": there}), models=({"allowed_drop_ins": allowed},))
    assert isinstance(outcome, Refused) is refused
    if refused:
        assert str(outcome) == (
            f"models: m0: {path} changes llama-server-m0.service and was not made for it alone: remove it, or name it in "
            'allowed_drop_ins: ["x.conf"]'
        )


@pytest.mark.parametrize(
    ("process", "unit", "pid", "who"),
    [
        ("nginx", "nginx.service", 9, "nginx.service (pid 9)"),
        ("nginx", None, 9, "nginx (pid 9)"),
        (None, None, 0, "another program"),
    ],
)
def test_a_port_that_another_program_has(process, unit, pid, who):
    taken = Listener(address="0.0.0.0", port=9001, pid=pid, process=process, unit=unit)
    assert refusal(survey(listeners=(taken,)), models=({}, {})) == (
        f"models: m1: port 9001 on 127.0.0.1 is taken by {who}: stop it, or give the model another port"
    )


@pytest.mark.parametrize(
    ("address", "unit", "conflict"),
    [
        ("127.0.0.1", None, True),
        ("0.0.0.0", "nginx.service", True),
        ("::", None, True),
        ("127.0.1.2", None, False),
        ("127.0.0.1", "llama-server-m0.service", False),
        ("127.0.0.1", "llama-server-old.service", False),
        ("127.0.0.1", "llama-server-other.service", True),
    ],
)
def test_who_is_in_the_way_of_a_port(address, unit, conflict):
    (instance,) = planning.settings({"port": 8080}).models
    listener = Listener(address=address, port=8080, pid=9, process="nginx", unit=unit)
    other = Listener(address=address, port=8081, pid=9, process="nginx", unit=None)
    assert bool(port_taken(instance, [other, listener], {"llama-server-old.service"})) is conflict
    assert port_taken(instance, [other], ()) is None


def test_the_port_of_an_instance_that_this_run_removes_is_free():
    from tests.service.test_changes import INSTANCE

    old = Listener(address="127.0.0.1", port=9000, pid=9, process="llama-server", unit="llama-server-old.service")
    host = survey(listeners=(old,), instances={"old": INSTANCE})
    assert isinstance(decided(host), Desired)
    assert "is taken by llama-server-old.service" in refusal(survey(listeners=(old,)))


# --- what is refused first ------------------------------------------------------------------------


def test_access_comes_before_plans_and_plans_before_the_toolkit():
    assert "ordinary user" in refusal(survey(machine={"ram_gib": 4}, euid=1000))
    no_driver = {"driver": {"nvidia": None, "cuda": None}, "ram_gib": 2}
    assert "does not fit" in refusal(survey([{"total_mib": 2048}], no_driver))


# --- decided ----------------------------------------------------------------------------------------


def lacking(desired):
    return tuple(need.name for need in desired.lacking)


def test_a_bare_host_gets_a_service_a_build_and_what_is_missing():
    host = survey([{}], missing_packages=("cmake", "curl", "glslc"))
    desired = decided(
        host, run=dataclasses.replace(RUN, secrets={"m0": {"api-keys": "key\n"}}), models=({"api_key_file": "/k"},)
    )
    (serving,) = desired.servings
    assert lacking(desired) == ("curl", "cmake")  # what its backend needs, of what is missing
    assert isinstance(desired.install_toolkit, Install) and desired.build.architectures == ("89",)
    assert desired.build.toolkit == desired.install_toolkit.identity and desired.build.commit == RUN.commit
    assert serving.folder == "/var/lib/llamafleet/models/m-aaaaaaaaaaaa"
    assert serving.service.argv[:3] == (
        f"{desired.build.release}/bin/llama-server",
        "--model",
        f"{serving.folder}/m.gguf",
    )
    assert serving.service.argv[-2:] == ("--api-key-file", "/run/credentials/llama-server-m0.service/api-keys")
    assert serving.service.secrets.keys() <= CREDENTIALS.keys() and not serving.is_verified


def test_what_no_repository_has_is_named_with_the_way_out():
    """vocalinux#212: Ubuntu 22.04 has no glslc."""
    host = survey([{}], missing_packages=("glslc", "cmake"))
    offers = {"glslc": Offer(None), "cmake": Offer("cmake", "3.22.1")}
    assert refusal(host, dataclasses.replace(RUN, offers=offers), backend="vulkan", vulkan_devices=[]) == (
        "packages: glslc is missing, and no enabled repository of the host has glslc: install LunarG's Vulkan SDK, whose "
        "glslc on the PATH of root's services does as well"
    )


@pytest.mark.parametrize(("manager", "repository", "command"), [
    ("apt", "universe", "add-apt-repository universe"), ("dnf", "crb", "dnf config-manager --set-enabled crb"),
    ("dnf", "codeready-builder-for-rhel-9-x86_64-rpms",
     "subscription-manager repos --enable codeready-builder-for-rhel-9-x86_64-rpms"),
    ("zypper", "backports", "zypper modifyrepo --enable backports"),
])  # fmt: skip
def test_a_repository_that_is_off_is_named_with_the_command_that_switches_it_on(manager, repository, command):
    host = survey(missing_packages=("cmake",), machine={"package_manager": manager})
    text = refusal(host, dataclasses.replace(RUN, offers={"cmake": Offer(None, off=(repository,))}))
    assert text == ("packages: cmake is missing, and no enabled repository of the host has cmake "
                    f"({repository}: switched off there): {command}")  # fmt: skip


def test_what_the_host_can_do_without_is_not_asked_for_again():
    """ninja-build/ninja#2199: in CRB, which is off; make compiles."""
    host = survey(missing_packages=("ninja", "cmake"))
    assert lacking(decided(host)) == ("cmake", "ninja")
    offers = {"ninja": Offer(None, off=("crb",)), "cmake": Offer("cmake", "3.26.5")}
    assert lacking(decided(host, dataclasses.replace(RUN, offers=offers))) == ("cmake",)


def test_hip_that_is_too_old_is_refused_where_something_is_compiled():
    """ggml-org/llama.cpp#16320, llama-toolchest#142."""
    old = {"path": "/opt/rocm", "version": "5.7", "compiler": None, "hipblas": True, "rocblas": True}
    text = refusal(survey([AMD], rocm=(old,)), backend="hip")
    assert text.startswith("backend: hip: HIP in /opt/rocm is 5.7, llama.cpp needs 6.1 or later; install ROCm")
    new = decided(survey([AMD], rocm=({**old, "version": "6.3"},)), backend="hip")
    assert new.hip.path == "/opt/rocm"
    there = survey([AMD], rocm=(old,), releases={new.build.key: {}})
    assert decided(there, backend="hip").hip is None  # nothing is compiled


def test_tools_that_are_too_old_are_refused_before_an_hour_of_compiling():
    """RHEL 8's g++ 8 has no std::filesystem in its library, Ubuntu 20.04's CMake 3.16 cannot do CUDA."""
    old = refusal(survey(tools={"g++": "8.5.0", "cmake": "3.26.5"}))
    assert old.startswith("packages: g++ 8.5.0 is too old to compile llama.cpp, 9 or later is needed: link a newer one")
    coming = dataclasses.replace(RUN, offers={"g++": Offer("g++", "4:8.3.0-1"), "cmake": Offer("cmake", "3.16.3-1")})
    host = survey([{}], missing_packages=("g++", "cmake"))
    text = refusal(host, coming)
    assert (
        "g++ 4:8.3.0-1 is too old" in text and "cmake 3.16.3-1 is too old to compile llama.cpp, 3.18 or later" in text
    )
    cpu = dataclasses.replace(RUN, offers={"g++": Offer("g++", "4:9.3.0-1"), "cmake": Offer("cmake", "3.16.3-1")})
    assert isinstance(decided(survey(missing_packages=("g++", "cmake")), cpu), Desired)
    there = survey(tools={"g++": "8.5.0"}, releases={decided(survey()).build.key: {}})
    assert isinstance(decided(there), Desired)  # nothing is compiled


def test_arch_s_repositories_are_asked_for_their_toolkit():
    arch = {"os": {"id": "arch", "version": "", "arch": "x86_64", "libc": "2.42"}, "package_manager": "pacman"}
    settings, read, files = reading(survey([{}], arch))
    inputs = plan_inputs(settings, read, files)
    outcome = desire(inputs, RUN, lambda template, values: template)
    assert [need.name for need in to_ask(inputs, outcome)] == ["cuda", "g++"]
    run = dataclasses.replace(RUN, offers={"cuda": Offer("cuda", "13.0.2-1")})
    outcome = desire(inputs, run, lambda template, values: template)
    assert outcome.install_toolkit.packages == ("cuda",) and outcome.build.toolkit == "cuda-13.0"


def test_nothing_is_compiled_with_where_the_build_is_there():
    bare = decided(survey(missing_packages=("cmake", "curl")))
    there = survey(missing_packages=("cmake", "curl"), releases={bare.build.key: {}})
    assert (lacking(bare), lacking(decided(there))) == (("curl", "cmake"), ("curl",))
    digest, other = "a" * 64, "b" * 64
    cached = survey(missing_packages=("cmake", "curl"), cached_builds={bare.build.key: (other, digest)})
    known = dataclasses.replace(RUN, digests={bare.build.key: [digest]})
    assert lacking(decided(cached, known)) == ("curl",) and decided(cached, known).is_cached
    # A build that nobody knows the digest of is not taken, so this host compiles.
    for run in (RUN, dataclasses.replace(RUN, digests={bare.build.key: ["c" * 64], "f" * 16: [digest]})):
        assert lacking(decided(cached, run)) == ("curl", "cmake") and not decided(cached, run).is_cached


def test_secrets_are_in_no_representation():
    desired = decided(
        run=dataclasses.replace(RUN, secrets={"m0": {"api-keys": "hush-hush"}}), models=({"api_key_file": "/k"},)
    )
    assert desired.servings[0].service.secrets == {"api-keys": "hush-hush"}
    assert "hush-hush" not in repr(desired)


def test_plans_that_the_binary_refused_are_no_desired_state():
    desired = decided()
    choice = desired.inputs.keep_or_replan({})
    none = dataclasses.replace(
        choice, results=(Refusal("m0: too little RAM", instance="m0", suggestions=("buy some",)),)
    )
    outcome = with_plans(desired, none, {}, {}, lambda template, values: template)
    assert str(outcome) == "models: m0: too little RAM; buy some"


def test_an_answer_of_the_binary_is_recorded():
    desired = decided()
    choice, answer = desired.inputs.keep_or_replan({}), Verified({"host": 1}, {"host": 1})
    after = with_plans(desired, choice, {}, {"m0": answer}, lambda template, values: template)
    assert after.servings[0].record["verified"] == answer.to_json() and after.servings[0].is_verified
    assert after.servings[0].record["identity"] == desired.servings[0].record["identity"]


# --- pure -------------------------------------------------------------------------------------------

# What deciding must not do: how the names of Python's audit events begin.
EFFECTS = ("open", "os.", "socket.", "subprocess.", "shutil.", "urllib.")


class Watch:
    """Notes effects while it is on; an audit hook stays for the life of the process."""

    def __init__(self):
        self.on, self.effects = False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.on and event.startswith(EFFECTS):
            self.effects.append((event, arguments[:1]))


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.mark.parametrize("gpus", [[], [{}], [AMD]], ids=["cpu", "cuda", "hip"])
def test_deciding_touches_no_file_no_program_and_no_network(watch, gpus):
    read = reading(survey(gpus))
    decide(*read)  # imports what is imported late
    watch.on = True
    try:
        outcome = decide(*read)
    finally:
        watch.on = False
    assert isinstance(outcome, Desired) and watch.effects == []


def test_the_same_inputs_give_the_same_host():
    assert decided(survey([{}])) == decided(survey([{}]))


# --- models on another disk, and the operator's variables ------------------------------------------


def folder_of(outcome):
    return outcome.servings[0].folder


def lies(kind="folder", target=None):
    return Place(kind, 0o755, 0, 0, target)


def placed(place=None, **asked):
    """What is decided where the model's folder is this; None: nothing is there."""
    folder = folder_of(decided())
    return decided(survey(paths={**FOLDERS, **({folder: place} if place else {})}), **asked)


def store(outcome):
    return stored_at(outcome.servings[0].model, outcome.settings, outcome.installed)


def test_a_model_that_is_to_be_downloaded_goes_to_the_disk_that_the_settings_name():
    """ollama/ollama#2701, #14347, #1311: models on another disk."""
    assert store(placed()) is None and store(placed(models_dir=MODELS)) is None
    name = folder_of(decided()).rpartition("/")[2]
    assert store(placed(models_dir="/mnt/big")) == f"/mnt/big/{name}"
    # The plan is none of another model, and the command line has the usual path.
    assert placed(models_dir="/mnt/big").servings[0].service.argv == placed().servings[0].service.argv
    assert placed(models_dir="/mnt/big").inputs.keys == placed().inputs.keys


def test_the_mount_of_a_disk_is_the_nearest_one_above():
    def space(mount):
        return Space(place=mount, device="1", free_bytes=2**40, mount=mount)

    left = Left(
        spaces={"/usr": space("/"), "/mnt/big/models": space("/mnt/big"), "/mnt": space("/mnt"), "/m": space("/mnt/b")}
    )
    there = dataclasses.replace(INSTALLED, left=left)
    assert mount_of("/mnt/big/models/m-1", there) == "/mnt/big" and mount_of("/mnt/other/m-1", there) == "/mnt"
    assert mount_of("/opt/models/m-1", there) is None is mount_of(None, there)


def test_a_model_stays_where_it_is():
    name = folder_of(decided()).rpartition("/")[2]
    assert store(placed(lies(), models_dir="/mnt/big")) is None
    for settings in ({}, {"models_dir": "/mnt/big"}):
        assert store(placed(lies(target=f"/mnt/old/{name}"), **settings)) == f"/mnt/old/{name}"
    # A relative link, which we do not make, is an operator's.
    assert store(placed(lies(target="../elsewhere"))) is None


def test_a_model_whose_disk_is_not_there_is_not_downloaded_to_another_one():
    folder = folder_of(decided())
    name = folder.rpartition("/")[2]
    assert str(placed(lies("link", f"/mnt/big/{name}"))) == (
        f"models: m0: {folder} leads to /mnt/big/{name}, which is not there: mount its disk, or remove the link to have "
        "the model downloaded again"
    )
    assert store(placed(lies("link", "/nonexistent"))) is None  # no link of ours: it is replaced


def test_hip_is_compiled_for_the_card_that_the_variables_name():
    """ggml-org/llama.cpp#14421: HSA_OVERRIDE_GFX_VERSION."""
    outcome = decided(survey([{**AMD, "gfx": "gfx1032"}]), environment={"HSA_OVERRIDE_GFX_VERSION": "10.3.0"})
    plain = decided(survey([{**AMD, "gfx": "gfx1032"}]))
    assert (outcome.build.architectures, plain.build.architectures) == (("gfx1030",), ("gfx1032",))
    assert outcome.servings[0].service.identity != plain.servings[0].service.identity
    assert outcome.inputs.keys == plain.inputs.keys
