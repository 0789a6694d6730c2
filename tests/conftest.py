"""For all tests: pyinfra's command line must not turn this process over to gevent.

Importing it (pyinfra_testing does) replaces sockets and threads of the whole process, which servers
and clients of other tests here have not asked for. Runs of pyinfra itself are processes of their own.
"""

import gevent.monkey

_patch_all, gevent.monkey.patch_all = gevent.monkey.patch_all, lambda: None
try:
    import pyinfra_cli  # noqa: F401
finally:
    gevent.monkey.patch_all = _patch_all
