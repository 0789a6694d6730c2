"""Reading a host: what machine it is and what is installed and running there."""

from __future__ import annotations

import json
from typing import Any

from pyinfra.api.host import Host

from llamafleet.host import answers
from llamafleet.host.installed import Survey
from llamafleet.remote.common import VAR
from llamafleet.service import disks
from llamafleet.service.left import open_ports
from llamafleet.settings.schema import Settings
from tasks.lib import lookups, remote, sending


def asked_left(settings: Settings) -> dict[str, Any]:
    """What `llamafleet/remote/left.py` is asked: ports that other machines are to reach, disks that a run fills."""
    return {"ports": sorted(open_ports(settings)), "paths": list(disks.paths(settings))}


def survey(host: Host, packages: dict[str, tuple[str, ...]], settings: Settings, *, bandwidth: bool = False) -> Survey:
    """Read the host: by its installed helpers if they are of this version, else by a copy in a temporary
    folder, which is removed afterwards: so a bare host can be read too.

    `packages` are the wanted distribution packages by package manager. `bandwidth`: measure the memory's, which takes a
    second where no installed plan has it. Raises
    `remote.RemoteError` with what the host said, `MachineError` for an unusable answer, and `payload.PayloadError`.
    """
    asked = json.dumps(
        {
            "packages": packages,
            "build_cache": settings.build_cache,
            "vulkan": settings.backend == "vulkan",
            # Where the operator says a toolkit is, beside the usual places.
            "toolkits": [settings.cuda_toolkit] if settings.cuda_toolkit.startswith("/") else [],
            "paths": ["/opt", VAR],
            "bandwidth": bandwidth,
            "addresses": sorted({instance.listen for instance in settings.models}),
            "left": asked_left(settings),
        }
    )
    ok, out, err = sending.run_helper(host, "survey.py", asked, purpose="the survey", seconds=remote.SURVEY_SECONDS,
                                       network=lookups.network(settings))  # fmt: skip
    if not ok or not out:
        raise remote.RemoteError(f"cannot read the host: {remote.explain(out, err)}")
    return answers.survey(out[-1])
