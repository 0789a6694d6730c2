"""What the stages share. Whoever imports it prints cleaned texts only (`output.py`), and ends as `ends.py` says."""

from tasks.lib import ends, output

output.install()
ends.install()
