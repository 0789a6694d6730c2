"""`python -m llamafleet.cli`."""

import sys

from llamafleet.cli.main import main

sys.exit(main())
