"""When Prometheus says that something of the fleet wants a look: each alert as an expression and what to do.

Decision 26: docs/decisions/0026-watched-by-standard-parts.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CRITICAL, WARNING = "critical", "warning"
MINUTE, HOUR, DAY = 60, 3600, 86400
# A wedged server that was restarted is told for so long, seconds.
WEDGE_SECONDS = 15 * MINUTE
# The gate's floor lets speeds pass that are worth a look: noise alone takes less than a third.
SLOW_SHARE = 0.7
# What a plan counts for a server of the host's memory is held with a twentieth more, a GPU's with what it is left of
# `gpu_reserve_mib` and of the CUDA context's 512 MiB.
HOST_SHARE = 1.05
GPU_BYTES = 1536 * 2**20
NEAR_LIMIT_SHARE = 0.95
LOW_SHARE = 0.05
CERTIFICATE_SECONDS = 14 * DAY
# The timer writes every half minute.
OLD_SECONDS = 5 * MINUTE
ERRORS_SHARE = 0.05


@dataclass(frozen=True)
class Alert:
    """`value` is known of every host, whether all is well or not; the alert is on while it compares as `when` says, for
    `seconds`. `summary` and `to_do` are templates of Prometheus."""

    name: str
    value: str
    when: str
    seconds: int
    severity: str
    summary: str
    to_do: str

    @property
    def expression(self) -> str:
        """In PromQL."""
        return f"({self.value}) {self.when}"

    def to_json(self) -> dict[str, Any]:
        """As Prometheus reads a rule."""
        return {
            "alert": f"Llamafleet{self.name}", "expr": self.expression, "for": f"{self.seconds}s",
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "description": self.to_do},
        }  # fmt: skip


_SERVER = "{{ $labels.host }}/{{ $labels.name }}"
_STATUS = "`llamafleet status` and `journalctl -u llama-server-{{ $labels.name }}` on {{ $labels.host }} say more"
_DEPLOY = "a deploy sets it right: `pyinfra INVENTORY deploy.py --limit {{ $labels.host }}`"

ALERTS = (
    Alert("HostDown", 'up{job="hosts"}', "== 0", 2 * MINUTE, CRITICAL,
          "{{ $labels.host }}: its metrics cannot be read",
          "is the host up, does llamafleet-node-exporter.service run, and does its firewall let this one in?"),
    Alert("ServerDown", "llamafleet_instance_active + llamafleet_instance_starting "
          "unless on (host, name) (llamafleet_instance_on_demand == 1)",
          "== 0", 2 * MINUTE, CRITICAL, f"{_SERVER} does not run", _STATUS),
    Alert("ServerSilent", '(up{job="servers"} or llamafleet_server_answers) '
          "unless on (host, name) (llamafleet_instance_starting == 1)", "== 0", 3 * MINUTE, CRITICAL,
          f"{_SERVER} does not answer", _STATUS),
    Alert("ServerWedged", "time() - llamafleet_last_wedge_time_seconds", f"< {WEDGE_SECONDS}", 0, WARNING,
          f"{_SERVER} made no progress, and was restarted",
          "`journalctl -u llama-server-{{ $labels.name }}-liveness` on {{ $labels.host }} says why"),
    Alert("ServerStuck", "increase(llamacpp:n_decode_total[5m]) and on (host, name) "
          "(min_over_time(llamacpp:requests_processing[5m]) > 0)", "== 0", 5 * MINUTE, CRITICAL,
          f"{_SERVER} has requests, and computes nothing",
          "the liveness check restarts it, unless liveness_seconds is 0 or its batches take long"),
    Alert("ServerRestarts", 'increase(llamafleet_restarts_total{by="systemd"}[1h])', "> 2", 0, WARNING,
          f"{_SERVER} ended by itself {{{{ $value | humanize }}}} times within an hour", _STATUS),
    Alert("LivenessFailed", "llamafleet_liveness_failed", "== 1", 5 * MINUTE, WARNING,
          f"{_SERVER}: its liveness check cannot look",
          "`journalctl -u llama-server-{{ $labels.name }}-liveness` on {{ $labels.host }} says why"),
    Alert("Drift", "llamafleet_drift", "== 1", 5 * MINUTE, WARNING,
          f"{_SERVER} is not as it was installed: {{{{ $labels.what }}}}", _DEPLOY),
    Alert("GateFailed", "llamafleet_gate_ok", "== 0", 0, WARNING, f"{_SERVER}: its last gate failed", _STATUS),
    Alert("GateSlow", "llamafleet_gate_tokens_per_second / llamafleet_gate_usual_tokens_per_second",
          f"< {SLOW_SHARE}", 0, WARNING,
          f"{_SERVER}: its last gate measured {{{{ $value | humanizePercentage }}}} of the usual speed",
          "did another program compute meanwhile? Then deploy again, else compare commit, driver and kernel"),
    Alert("GateSlower", "llamafleet_gate_slower", "== 1", 0, WARNING,
          f"{_SERVER} is slower since the driver or the kernel changed", "`llamafleet status` has the figures"),
    Alert("MemoryAbovePlan", 'llamafleet_held_bytes{device="host"} / llamafleet_planned_bytes', f"> {HOST_SHARE}",
          10 * MINUTE, WARNING,
          f"{_SERVER} holds {{{{ $value | humanizePercentage }}}} of the memory that was planned",
          "the next plan on this host counts on the planned figure: `llamafleet plan` shows what it is made of"),
    Alert("GpuMemoryAbovePlan", 'llamafleet_held_bytes{device!="host"} - llamafleet_planned_bytes',
          f"> {GPU_BYTES}", 10 * MINUTE, WARNING,
          f"{_SERVER} holds {{{{ $value | humanize1024 }}}}B more of {{{{ $labels.device }}}} than was planned",
          "raise gpu_reserve_mib, or take a shorter context, before it runs out"),
    Alert("MemoryNearLimit", "llamafleet_cgroup_bytes / llamafleet_limit_bytes", f"> {NEAR_LIMIT_SHARE}",
          5 * MINUTE, CRITICAL, f"{_SERVER} holds {{{{ $value | humanizePercentage }}}} of its MemoryMax",
          "the kernel ends it there; a smaller prompt_cache_mib takes less"),
    Alert("HostMemoryLow", "node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes", f"< {LOW_SHARE}",
          5 * MINUTE, CRITICAL, "{{ $labels.host }} has {{ $value | humanizePercentage }} of its memory left",
          "what else runs there? The plan leaves it ram_reserve_mib"),
    Alert("DiskFull", 'node_filesystem_avail_bytes{fstype!~"tmpfs|ramfs|squashfs|iso9660"} / '
          "(node_filesystem_size_bytes > 0)", f"< {LOW_SHARE}", 5 * MINUTE, WARNING,
          "{{ $labels.host }}: {{ $labels.mountpoint }} has {{ $value | humanizePercentage }} left",
          "old releases and models that nothing serves may go: `llamafleet status` lists them"),
    Alert("CertificateEnds", "llamafleet_certificate_end_time_seconds - time()", f"< {CERTIFICATE_SECONDS}", 0, WARNING,
          f"{_SERVER}: its certificate ends in {{{{ $value | humanizeDuration }}}}",
          "give tls_certificate_file a new one, and deploy"),
    Alert("MetricsOld", "time() - llamafleet_metrics_time_seconds", f"> {OLD_SECONDS}", 0, WARNING,
          "{{ $labels.host }}: nothing is known of its instances since {{ $value | humanizeDuration }}",
          "`journalctl -u llamafleet-metrics` on {{ $labels.host }} says why"),
    Alert("MetricsErrors", "llamafleet_metrics_errors", "> 0", 5 * MINUTE, WARNING,
          "{{ $labels.host }}: not all of its instances can be read",
          "`journalctl -u llamafleet-metrics` on {{ $labels.host }} names them"),
    Alert("GatewayServerDown", 'haproxy_server_status{state="DOWN"}', "== 1", 2 * MINUTE, WARNING,
          "{{ $labels.host }}: the gateway sends {{ $labels.server }} no requests",
          "`python3 /opt/llamafleet/helpers/current/gateway_admin.py show` there has what its check said"),
    Alert("GatewayQueue", "haproxy_backend_current_queue", "> 0", 10 * MINUTE, WARNING,
          "{{ $labels.host }}: requests wait for {{ $labels.proxy }} all the time",
          "more slots, copies or hosts for this model, or a shorter gateway_queue_seconds"),
    Alert("GatewayErrors", 'sum by (host, proxy) (rate(haproxy_backend_http_responses_total{code="5xx"}[5m])) / '
          "(sum by (host, proxy) (rate(haproxy_backend_http_responses_total[5m])) > 0)", f"> {ERRORS_SHARE}",
          5 * MINUTE, WARNING,
          "{{ $labels.host }}: {{ $value | humanizePercentage }} of the replies for {{ $labels.proxy }} are errors",
          "`journalctl -u llamafleet-gateway` there, and the servers' own journals"),
)  # fmt: skip


def rules() -> dict[str, Any]:
    """All alerts as a file of rules."""
    return {"groups": [{"name": "llamafleet", "rules": [one.to_json() for one in ALERTS]}]}
