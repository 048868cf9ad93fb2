"""A server in a process of its own, for a test that kills it: `python -m tests.serving.worker FOLDER`."""

import sys
import time
from pathlib import Path

from tests.serving.common import serving

with serving(Path(sys.argv[1])) as (address, _):
    print(address, flush=True)
    time.sleep(600)
