"""Programs that run on the hosts: builtin types in, JSON on stdout, nothing of ours imported.

Decision 14: docs/decisions/0014-hosts-need-no-python-packages.md.
"""
