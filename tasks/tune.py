"""Stage: measure on the host what serves the workload fastest, and keep a record of it, which plans obey.

`pyinfra INVENTORY tasks.tune.tune` measures every model that has no record which holds, whatever the setting `tune`
says; in `deploy.py` the setting decides, and the same run installs what won.

Decision 23: docs/decisions/0023-tuned-by-measurement.md.
"""

from __future__ import annotations

from functools import partial

from pyinfra import host
from pyinfra.api.deploy import deploy

from llamafleet.service.tune import in_lines, to_measure, wishes
from llamafleet.settings.schema import NEVER
from tasks.lib import operations, records, tuning
from tasks.lib.decision import for_stage


@deploy("Tune")
def tune(as_set: bool = False) -> None:
    """Measure the host's models, one after another. `as_set`: those that the setting `tune` asks for."""
    now = for_stage("tune", lambda now: bool(to_measure(now.desired, as_set=as_set)))
    if now is None:
        return
    if as_set and now.desired.settings.tune == NEVER:
        return
    found = wishes(now.desired, as_set=as_set)
    for line in in_lines(found) if not as_set else ():
        host.log(line)
    names = to_measure(now.desired, as_set=as_set)
    measure = partial(tuning.tune_instance, installs=as_set)
    operations.for_instances(name=f"Measure {', '.join(names) or 'nothing'}", names=names, action=measure)
    if copied := tuning.to_copy(now, host.name, records.kept()):
        operations.for_instances(name="Copy records of tunes here", names=copied, action=tuning.copy_here)
