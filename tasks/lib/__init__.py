"""What the stages share. Whoever imports it prints cleaned texts only (`output.py`), ends as `ends.py` says,
and spends less time in pyinfra (`pace.py`)."""

from tasks.lib import ends, output, pace

output.install()
ends.install()
pace.install()
