"""Reading a host: what machine it is and what is installed and running there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pyinfra.api.host import Host

from llamafleet.build.packages import Need, asked_of_hosts
from llamafleet.host import answers
from llamafleet.host.installed import Offer, Survey
from llamafleet.remote import network
from llamafleet.remote.common import VAR
from llamafleet.service import disks
from llamafleet.service.left import open_ports
from llamafleet.settings.schema import Settings
from tasks.lib import lookups, remote, sending
from tasks.lib.groups import is_gateway, is_monitor


def asked_left(host: Host, settings: Settings) -> dict[str, Any]:
    """What `llamafleet/remote/left.py` is asked: ports that other machines are to reach, disks that a run fills."""
    is_watched = any(is_monitor(one) for one in host.state.inventory if one is not host)
    ports = open_ports(settings, is_gateway=is_gateway(host), is_watched=is_watched)
    return {"ports": sorted(ports), "paths": list(disks.paths(settings))}


def survey(host: Host, settings: Settings, *, bandwidth: bool = False, packages: bool = True) -> Survey:
    """Read the host: by its installed helpers if they are of this version, else by a copy in a temporary
    folder, which is removed afterwards: so a bare host can be read too.

    `bandwidth`: measure the memory's, which takes a second where no installed plan has it. `packages`: look for what
    the host lacks to run and to compile. Raises `remote.RemoteError` with what the host said, `MachineError` for an
    unusable answer, and `payload.PayloadError`.
    """
    asked = json.dumps(
        {
            "packages": asked_of_hosts() if packages else {},
            "build_cache": settings.build_cache,
            "vulkan": settings.backend == "vulkan",
            # Where the operator says a toolkit is, beside the usual places.
            "toolkits": [settings.cuda_toolkit] if settings.cuda_toolkit.startswith("/") else [],
            "paths": ["/opt", VAR],
            "bandwidth": bandwidth,
            "addresses": sorted({instance.listen for instance in settings.models}),
            "left": asked_left(host, settings),
        }
    )
    ok, out, err = sending.run_helper(host, "survey.py", asked, purpose="the survey", seconds=remote.SURVEY_SECONDS,
                                       network=lookups.network(settings))  # fmt: skip
    if not ok or not out:
        raise remote.RemoteError(f"cannot read the host: {remote.explain(out, err)}")
    return answers.survey(out[-1])


def offers(host: Host, manager: str, needs: Iterable[Need], settings: Settings) -> Mapping[str, Offer]:
    """What the host's repositories have for what it lacks, read by the way out that the settings name. Raises as
    `survey` does."""
    asked = json.dumps({need.name: need.to_json(manager) for need in needs})
    ok, out, err = sending.run_helper(host, "packages.py", "offers", manager, asked,
                                      json.dumps(network.variables(settings.proxy, settings.no_proxy, None)),
                                      purpose="the question for packages", seconds=remote.SURVEY_SECONDS,
                                      network=lookups.network(settings))  # fmt: skip
    if not ok or not out:
        raise remote.RemoteError(f"cannot ask {manager} what it has: {remote.explain(out, err)}")
    return answers.offers(out[-1])
