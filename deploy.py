"""From a bare Linux host to a hardened llama-server that runs what was planned for it.

    pyinfra inventory/local.py deploy.py        this machine
    pyinfra inventory/fleet.py deploy.py        a fleet; --dry, --diff and --limit as ever

Every stage can be run alone: pyinfra inventory/fleet.py tasks.build.build. From another folder, or from an installed
package, this file is `llamafleet.deploy`, and a stage `llamafleet.stages.build`.

Decision 15: docs/decisions/0015-pyinfra-stays-visible.md.
"""

from llamafleet.stages import bootstrap, build, gateway, model, monitoring, plan, service, toolkit, tune, verify

plan()  # first: a host that cannot hold its models is refused before anything is changed
bootstrap()
toolkit()
build()
model()
verify()  # the built llama-server itself is asked; where it disagrees, what follows is planned again
tune(as_set=True)  # measured on the host, where the setting `tune` says so; what won is installed
service()  # last: the old services run until the new ones have passed the gate
gateway()  # on hosts of the group of that name: their gateway learns of the servers
monitoring()  # where the inventory has a group of that name: Prometheus there, node-exporter on all hosts
