"""Disposable Debian hosts with a real systemd, and stand-ins for outside services: for demo and tests.

`python -m sandbox up --hosts 2` starts hosts, `sandbox.hosts` is the same for Python.
"""
