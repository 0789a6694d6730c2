"""What the stages share. Whoever imports it prints cleaned texts only: see `output.py`."""

from tasks.lib import output

output.install()
