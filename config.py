"""pyinfra reads this file first, before it connects: from there on what it prints is cleaned.

See tasks/lib/output.py.
"""

import tasks.lib  # noqa: F401
