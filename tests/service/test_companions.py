"""Files beside a model: looked up, downloaded, recorded, found missing and counted as the model's own are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from llamafleet.host.left import Left
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.memory.beside import Beside
from llamafleet.model.gguf import read_path
from llamafleet.planner import beside
from llamafleet.planner.result import Refusal
from llamafleet.remote.common import MODELS
from llamafleet.service import disks
from llamafleet.service.changes import changes_needed
from llamafleet.service.companions import with_companions
from llamafleet.service.desired import Desired
from llamafleet.sources import SourceError
from llamafleet.units import GIB
from sandbox import adapters
from tests import planning
from tests.service.test_desired import decide, survey

DRAFT = {"speculation": "draft", "draft": "hf:a/small/d.gguf"}


def files(name, sha="a", size=GIB, layout="Qwen3-8B"):
    return ModelFiles((RemoteFile(name, f"https://x/{name}", size, sha * 64),), planning.header(layout))


def looked_up(instance, found, projector=lambda of: pytest.fail("no projector is chosen")):
    asked = []

    def look_up(one):
        asked.append((one.name, one.source, one.sha256, one.mirrors))
        return found[one.source]

    return with_companions(instance, look_up, projector), asked


def test_each_companion_is_looked_up_with_its_own_sums_and_mirrors():
    adapters = ["hf:a/l/one.gguf", {"source": "hf:a/l/two.gguf", "sha256": "e" * 64, "mirrors": ["https://m/two.gguf"]}]
    [instance] = planning.settings({"source": "hf:a/b/m.gguf", "sha256": "d" * 64, "adapters": adapters}).models
    found = {
        "hf:a/b/m.gguf": files("m.gguf"),
        "hf:a/l/one.gguf": files("one.gguf"),
        "hf:a/l/two.gguf": files("two.gguf"),
    }
    model, asked = looked_up(instance, found)
    assert list(model.companions) == ["adapter-1", "adapter-2"]
    assert model.companions["adapter-2"] is found["hf:a/l/two.gguf"]
    assert asked == [
        ("m0", "hf:a/b/m.gguf", ("d" * 64,), ()),
        ("m0: adapter-1", "hf:a/l/one.gguf", None, ()),
        ("m0: adapter-2", "hf:a/l/two.gguf", ("e" * 64,), ("https://m/two.gguf",)),
    ]


def test_a_projector_that_is_to_be_chosen_is_that_of_the_file_that_was_taken():
    [instance] = planning.settings({"source": "hf:a/b", "projector": "auto"}).models
    model = ModelFiles((RemoteFile("m.gguf", "https://x/m.gguf", 1, "a" * 64, chosen="hf:a/b/m.gguf"),),
                       planning.header("Qwen3-8B"))  # fmt: skip
    found = {"hf:a/b": model, "hf:a/b/mmproj.gguf": files("mmproj.gguf")}
    chosen, _ = looked_up(instance, found, {"hf:a/b/m.gguf": "hf:a/b/mmproj.gguf"}.__getitem__)
    assert chosen.companions["projector"] is found["hf:a/b/mmproj.gguf"]


def test_a_companion_that_is_not_found_is_an_error():
    def look_up(one):
        if "small" in one.source:
            raise SourceError(f"{one.name}: no")
        return files("m.gguf")

    [instance] = planning.settings({"source": "hf:a/b/m.gguf", **DRAFT}).models
    with pytest.raises(SourceError, match="m0: draft: no"):
        with_companions(instance, look_up, str)


@pytest.fixture
def drafted(monkeypatch):
    """A model with a draft of 1 GiB in RAM; what is decided about it on a host with these differences."""
    monkeypatch.setattr(beside, "UNFIT", ())
    monkeypatch.setattr(beside, "WAYS", (lambda asked: [Beside("draft", {}, GIB)] if asked.companions else [],))

    def decided(sha="b", **differences):
        model = files("m.gguf", size=12 * GIB)
        model = ModelFiles(model.files, model.header, companions={"draft": files("d.gguf", sha)})
        settings = planning.settings({"source": "hf:a/b/m.gguf", "context_tokens": 4096, **DRAFT})
        return decide(settings, survey(**differences), {"m0": model})

    return decided


def test_a_companion_is_downloaded_given_to_the_server_and_recorded(drafted):
    outcome = drafted()
    assert isinstance(outcome, Desired), outcome
    [serving] = outcome.servings
    own, draft = serving.models
    assert draft == f"{MODELS}/d-{'b' * 12}"
    changes = changes_needed(outcome, outcome.installed)
    assert changes.models == {own: (f"{own}/m.gguf is missing",), draft: (f"{draft}/d.gguf is missing",)}
    argv = serving.service.argv
    assert argv[argv.index("--spec-draft-model") + 1] == f"{draft}/d.gguf"
    assert [(one["path"], one["sha256"]) for one in serving.record["files"]] == [
        (f"{own}/m.gguf", "a" * 64), (f"{draft}/d.gguf", "b" * 64),
    ]  # fmt: skip
    assert serving.record["identity"] != drafted("c").servings[0].record["identity"]


def test_what_is_there_is_not_downloaded_and_not_unused(drafted):
    outcome = drafted()
    own, draft = outcome.servings[0].models
    there = {f"{own}/m.gguf": "a" * 64, f"{draft}/d.gguf": "b" * 64}
    outcome = drafted(models=there, left=Left(model_bytes={path: GIB for path in there}))
    assert changes_needed(outcome, outcome.installed).models == {}
    assert disks.unused(outcome) == []
    assert changes_needed(drafted("c", models=there), outcome.installed).models.keys() == {f"{MODELS}/d-{'c' * 12}"}


def test_a_companion_needs_a_known_sum(drafted):
    model = files("m.gguf")
    model = ModelFiles(model.files, model.header, companions={
        "draft": ModelFiles((RemoteFile("d.gguf", "https://x/d.gguf", 1),), model.header)
    })  # fmt: skip
    settings = planning.settings({"source": "hf:a/b/m.gguf", **DRAFT})
    assert str(decide(settings, survey(), {"m0": model})).startswith(
        "models: m0: draft: sha256: it is not known of d.gguf"
    )


# --- memory ---------------------------------------------------------------------------------------

GPUS = [24564, 24564]


def planned(monkeypatch, *ways, gpus=GPUS, ram_gib=64, **asked):
    monkeypatch.setattr(beside, "UNFIT", ())
    monkeypatch.setattr(beside, "WAYS", (lambda _: list(ways),))
    asked = {"context_tokens": 4096, **asked}
    [plan] = planning.plans(planning.machine(gpus, ram_gib=ram_gib), [("Qwen3-8B",)], planning.settings(asked))
    return plan


def rows(plan):
    return {row.device: row for row in plan.ledger}


def test_what_is_beside_the_model_is_taken_off_its_devices(monkeypatch):
    bare = planned(monkeypatch, gpus=GPUS[:1])
    plan = planned(monkeypatch, Beside("draft", {0: 3 * GIB}, GIB, ("--x", "{GPU0}"), "a draft"), gpus=GPUS[:1])
    for device, size in (("GPU0", 3 * GIB), ("host", GIB)):
        with_it, without = rows(plan)[device], rows(bare)[device]
        assert with_it.beside_bytes == size and with_it.used_bytes == without.used_bytes + size
        assert with_it.free_bytes == without.free_bytes - size and with_it.capacity_bytes == without.capacity_bytes
    assert plan.argv == (*bare.argv, "--x", "CUDA0")
    assert "a draft" in plan.why and plan.host_bytes == bare.host_bytes + GIB
    assert "beside_bytes" not in rows(bare)["host"].to_json() and rows(plan)["host"].to_json()["beside_bytes"] == GIB


def test_a_gpu_that_only_a_companion_uses_is_one_of_the_plan(monkeypatch):
    plan = planned(monkeypatch, Beside("draft", {1: 3 * GIB}, flags=("--x", "{GPU1}")))
    assert [row.device for row in plan.ledger] == ["GPU0", "GPU1", "host"]
    assert rows(plan)["GPU1"].beside_bytes == 3 * GIB and [gpu.index for gpu in plan.gpus] == [0, 1]
    assert planning.argument(plan.argv, "--device") == "CUDA0" and planning.argument(plan.argv, "--x") == "CUDA1"
    assert plan.environment["CUDA_VISIBLE_DEVICES"].count(",") == 1


def test_the_way_that_makes_the_workload_quickest_is_taken(monkeypatch):
    """Beside 22 GiB on its GPU the model would go to RAM; a way that is slow by itself has a handicap."""
    large, host = (
        Beside("draft", {0: 22 * GIB}, flags=("--on-gpu",)),
        Beside("draft", host_bytes=GIB, flags=("--on-host",)),
    )
    way = partial(planned, monkeypatch, gpus=GPUS[:1])
    assert way(large, host).argv[-1] == "--on-host"
    small = Beside("draft", {0: GIB}, flags=("--on-gpu",))
    assert way(small, host).argv[-1] == "--on-gpu"
    assert way(Beside("draft", {0: GIB}, handicap=1.5), host).argv[-1] == "--on-host"


def test_a_refusal_counts_what_is_beside_the_model(monkeypatch):
    plan = planned(monkeypatch, Beside("draft", host_bytes=60 * GIB), gpus=(), ram_gib=64)
    assert isinstance(plan, Refusal) and rows(plan)["host"].beside_bytes == 60 * GIB
    assert plan.needed_bytes - plan.available_bytes == -rows(plan)["host"].free_bytes


def test_a_companion_that_does_not_fit_the_model_is_a_refusal(monkeypatch):
    monkeypatch.setattr(beside, "UNFIT", (lambda asked: iter(["the draft has another vocabulary"]),))
    [plan] = planning.plans(planning.machine(), [("Qwen3-8B",)], planning.settings({}))
    assert isinstance(plan, Refusal) and plan.reason == "m0: the draft has another vocabulary"


def test_adapters_are_in_the_command_the_record_and_its_identity(tmp_path):
    def decided(*scales):
        entries = [{"source": f"hf:a/l/{name}.gguf", "scale": scale} for name, scale in zip("xy", scales, strict=True)]
        settings = planning.settings({"source": "hf:a/b/m.gguf", "context_tokens": 4096, "adapters": entries})
        loras = {}
        for name in "xy":
            header = read_path(adapters.lora(tmp_path, "Qwen3-8B", name=name))
            loras[name] = ModelFiles(
                (RemoteFile(f"{name}.gguf", f"https://x/{name}", 5, name.replace("x", "e").replace("y", "f") * 64),),
                header,
            )
        parts = {f"adapter-{number}": loras[name] for number, name in enumerate("xy", 1)}
        return decide(settings, survey([{}]), {"m0": replace(files("m.gguf"), companions=parts)}).servings[0]

    serving = decided(1, 0)
    folders = [folder for folder in serving.models if "/x-" in folder or "/y-" in folder]
    wanted = [{"path": f"{folders[0]}/x.gguf", "scale": 1}, {"path": f"{folders[1]}/y.gguf", "scale": 0}]
    assert serving.record["gate"]["adapters"] == wanted
    scaled = f"{wanted[0]['path']}:1.0,{wanted[1]['path']}:0.0"
    assert planning.argument(serving.service.argv, "--lora-scaled") == scaled
    assert [one["path"] for one in serving.record["files"]][1:] == [one["path"] for one in wanted]
    assert serving.service.identity != decided(1, 0.5).service.identity == decided(1, 0.5).service.identity
    assert serving.plan.ledger[0].beside_bytes > 0
