"""`python -m ahn`: the command line."""

import sys

from ahn.cli import main

sys.exit(main())
