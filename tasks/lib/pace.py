"""What lets a run have a thousand hosts: less of pyinfra's own work for each operation and each connection, and files.

What these functions give is what pyinfra's give. `install` is called where `tasks.lib` is imported.
"""

from __future__ import annotations

import functools
import resource
import sys
from types import FrameType
from typing import Any

import paramiko
import pyinfra
from pyinfra.api import arguments
from pyinfra.api.operation import add_op
from pyinfra.api.state import State
from pyinfra.api.util import PYINFRA_INSTALL_DIR

# How often paramiko wakes up for a connection on which nothing comes, to see whether it is still wanted and whether a
# message is due that keeps it alive. Its own 0.1 s is 10000 times a second for a thousand hosts, which wait for each
# other. A connection that is closed here ends at once all the same.
IDLE_SECONDS = 5.0

# Of open files, for whose number most systems have a low limit for old programs, and a high one that may be asked for:
# a run keeps a connection to every host.
MOST_FILES = 65536

_operation: Any = sys.modules[add_op.__module__]  # the package has a function of the module's name


def install() -> None:
    """Put ourselves in pyinfra's way; a second call does nothing."""
    if _operation.get_operation_order_from_stack is order_from_stack:
        return
    allow_files()
    _operation.get_operation_order_from_stack = order_from_stack
    paramiko.Transport._active_check_timeout = IDLE_SECONDS  # type: ignore[attr-defined]
    # It evaluates the annotations of pyinfra's class of arguments, which are the same for ever.
    arguments.all_global_arguments = functools.cache(arguments.all_global_arguments)


def allow_files() -> None:
    """Let this process open as many files as it may, up to MOST_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def order_from_stack(state: State) -> list[int]:
    """In place of `get_operation_order_from_stack`, which looks for the source and the module of each frame: the lines
    of the frames from the deploy file inwards, without pyinfra's own."""
    places = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        places.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    places.reverse()
    files = [file for file, _ in places]
    if state.current_deploy_filename:
        there = state.current_deploy_filename in files
        places = places[files.index(state.current_deploy_filename) :] if there else []
    first = [state.current_op_file_number] if pyinfra.is_cli else []
    return first + [line for file, line in places if not file.startswith(PYINFRA_INSTALL_DIR)]
