"""``python -m fistapruner``."""

from .cli import main

raise SystemExit(main())
