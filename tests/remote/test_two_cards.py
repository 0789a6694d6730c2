"""Two cards as NVML shows them, through the probe to a copy of a model for each."""

from llamafleet.host.machine import Machine
from llamafleet.planner.copies import with_copies
from llamafleet.planner.plan import plan_host
from llamafleet.service import command
from llamafleet.settings.schema import Settings
from tests import planning

SMALLER = ("device1.name=NVIDIA GeForce RTX 3060", "device1.uuid=GPU-3060f00d-0000-4000-8000-000000000002",
           "device1.bus_id=00000000:02:00.0", "device1.cc=8.6", "device1.total_mib=12288", "device1.reserved_mib=200",
           "device1.used_mib=1", "device1.gen=4", "device1.width=16")  # fmt: skip


def test_each_card_gets_a_copy_that_is_planned_for_it_alone(host):
    host.nvml("count=2", *SMALLER)
    machine = Machine.from_json(host.probe())
    assert [gpu.name for gpu in machine.gpus] == ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060"]
    asked = planning.settings({"name": "chat", "port": 8080, "copies": "per_gpu", "context_tokens": 32768})
    settings = with_copies(asked, machine)
    assert isinstance(settings, Settings)
    assert [(one.unit, one.port) for one in settings.models] == [
        ("llama-server-chat-1.service", 8080), ("llama-server-chat-2.service", 8081),
    ]  # fmt: skip
    header = planning.header("Gemma-3-12B", "Q8_0")
    plans = plan_host(machine, [(one, header) for one in settings.models], settings)
    assert [[gpu.uuid for gpu in plan.gpus] for plan in plans] == [[gpu.uuid] for gpu in machine.gpus]
    # All layers fit on the large card, and not on the small one.
    on_host = [plan.ledger[-1].weights_bytes > plan.ledger[0].weights_bytes // 10 for plan in plans]
    assert on_host == [False, True], [row for plan in plans for row in plan.ledger]
    for plan, one, gpu in zip(plans, settings.models, machine.gpus, strict=True):
        assert plan.environment["CUDA_VISIBLE_DEVICES"] == gpu.uuid
        argv = command.argv(plan, one, "/m.gguf")
        assert planning.argument(argv, "--port") == str(one.port) and planning.argument(argv, "--device") == "CUDA0"
