"""What of a host's processors serves a model: threads, the CPUs they are kept on, the nodes of its memory.

Both are set by systemd before the server starts (`CPUAffinity=`, `NUMAPolicy=`). llama.cpp's own `--cpu-range`
and `--numa` set threads' CPUs anew for every graph they compute (ggml-cpu.c, ggml_graph_compute), which the
sandbox refuses, with a warning from each thread. docs/planning.md has what was weighed.
"""

from __future__ import annotations

from llamafleet.host.machine import Cpu
from llamafleet.memory.placement import Placement
from llamafleet.settings.schema import Instance


def threads(cpu: Cpu, instance: Instance) -> int:
    """One for each performance core, or as asked."""
    return instance.threads or max(1, cpu.performance_cores or cpu.physical_cores)


def cpus(cpu: Cpu, instance: Instance, placement: Placement, *, alone: bool) -> str:
    """The CPUs to keep the server on, as Linux lists them; empty: all of them.

    Models that share a host are left to the kernel: on the same few cores their threads would wait for each other.
    """
    return cpu.performance_cpus if alone and not instance.threads and computes(placement) else ""


def numa_nodes(cpu: Cpu, placement: Placement) -> str:
    """The NUMA nodes to spread the server's memory over, as Linux lists them; empty: as the kernel likes."""
    return (cpu.numa_node_list or "all") if cpu.numa_nodes > 1 and computes(placement) else ""


def computes(placement: Placement) -> bool:
    """Does the CPU compute layers, or a part of some?"""
    return placement.uses_host
