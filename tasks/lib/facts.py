"""Reading a host: what machine it is and what is installed and running there."""

from __future__ import annotations

import json
import platform
import shlex

from pyinfra.api.host import Host

from llamafleet import payload
from llamafleet.host import answers
from llamafleet.host.installed import Survey
from llamafleet.remote.common import HELPERS, VAR
from llamafleet.settings.schema import Settings
from tasks.lib import lookups, remote

# Printed where the host does not have our helpers of this version.
NO_HELPERS = "llamafleet-no-helpers"


def survey(host: Host, packages: dict[str, tuple[str, ...]], settings: Settings) -> Survey:
    """Read the host: by its installed helpers if they are of this version, else by a copy in a temporary
    folder, which is removed afterwards: so a bare host can be read too.

    `packages` are the wanted distribution packages by package manager. Raises
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
        }
    )
    return _by_helpers(host, asked) or _by_copy(host, asked)


def _by_helpers(host: Host, asked: str) -> Survey | None:
    folder = f"{HELPERS}/{payload.helpers_key()}"
    survey = f"python3 -s -E -B {folder}/survey.py {shlex.quote(asked)}"
    ok, out, err = remote.run(host, f"test -f {folder}/survey.py || {{ echo {NO_HELPERS}; exit 0; }}; {survey}")
    if out and out[-1] == NO_HELPERS:
        return None
    if not ok or not out:
        raise remote.RemoteError(f"cannot read the host: {remote.explain(out, err)}")
    return answers.survey(out[-1])


def _by_copy(host: Host, asked: str) -> Survey:
    ok, out, err = remote.run(host, "uname -m")
    arch = out[-1].strip() if ok and out else platform.machine()
    if not ok:
        raise remote.RemoteError(f"cannot run commands on the host: {remote.explain(out, err)}")
    path = remote.temporary(host, ".zip")
    remote.upload(host, lookups.once(("probe", arch), lambda: payload.probe_zip(arch)), path)
    return remote.run_json(host, shlex.join(payload.probe_command(path, "survey.py", asked)), answers.survey)
