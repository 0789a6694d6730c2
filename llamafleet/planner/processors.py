"""How a model uses a host's processors: number of threads, CPUs that they run on, NUMA nodes of the memory.

systemd sets CPUs and nodes before the server starts (`CPUAffinity=`, `NUMAPolicy=`). llama.cpp's own `--cpu-range`
and `--numa` set the threads' CPUs again for every graph they compute (ggml/src/ggml-cpu/ggml-cpu.c,
ggml_graph_compute); the unit's
hardening refuses that, and each thread logs a warning. docs/planning.md describes the alternatives.
"""

from __future__ import annotations

from llamafleet.host.machine import Cpu
from llamafleet.memory.placement import Placement
from llamafleet.settings.schema import Instance


def threads(cpu: Cpu, instance: Instance) -> int:
    """The number of threads: the instance's setting, or the number of performance cores (else physical cores)."""
    return instance.threads or cores(cpu, instance)


def cores(cpu: Cpu, instance: Instance) -> int:
    """Performance cores (else physical cores), no more than the CPUs that it may use: threads that share a CPU wait for
    each other."""
    return max(1, min(cpu.performance_cores or cpu.physical_cores, usable_cpus(cpu, instance)))


def usable_cpus(cpu: Cpu, instance: Instance) -> int:
    """How many CPUs are in the instance's `cpus`; all where it names none."""
    return len(numbers(instance.cpus)) if instance.cpus else cpu.logical_cores


def numbers(cpus: str) -> list[int]:
    """The numbers of a list of CPUs such as "0-5,12"."""
    ends = [[int(end) for end in part.split("-")] for part in cpus.split(",") if part]
    return [number for end in ends for number in range(end[0], end[-1] + 1)]


def cpus(cpu: Cpu, instance: Instance, placement: Placement, *, alone: bool) -> str:
    """The CPUs that the server may run on, such as "0-11"; empty: all CPUs.

    Models that share a host get no CPU list: restricted to the same few cores their threads would wait for each other.
    """
    if instance.cpus:
        return instance.cpus
    return cpu.performance_cpus if alone and not instance.threads and computes(placement) else ""


def numa_nodes(cpu: Cpu, instance: Instance, placement: Placement) -> str:
    """The NUMA nodes to spread the server's memory over, such as "0-1"; empty: the kernel decides."""
    asked = computes(placement) if instance.numa == "auto" else instance.numa == "interleave"
    return (cpu.numa_node_list or "all") if cpu.numa_nodes > 1 and asked else ""


def computes(placement: Placement) -> bool:
    """Does the CPU compute whole layers or parts of layers?"""
    return placement.uses_host
