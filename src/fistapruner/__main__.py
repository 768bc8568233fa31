"""``python -m fistapruner``."""

import os
import sys

from .cli import main
from .runtime.machine import launched

status = main()
if launched() > 1:  # torch's threads may abort while the interpreter of a process of torchrun is taken down
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
raise SystemExit(status)
