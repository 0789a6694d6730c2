"""Disposable Debian hosts with a real systemd and sshd, and stand-ins for outside services: for the demo and the tests.

`python -m sandbox up --hosts 2` starts hosts, `sandbox.hosts` is the same for Python.
"""
