"""Disposable Debian hosts with a real systemd, and stand-ins for outside services, for the demo and the tests.

`python -m sandbox up --hosts 2` starts hosts; `sandbox.hosts` does it from Python.
"""
