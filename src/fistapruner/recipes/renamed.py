"""Names that were renamed: an old one is refused with the new one named."""

from __future__ import annotations

RENAMED_SETTINGS = {"target": "dense_target", "match": "reconstruct"}
"""Recipe settings, old name to new name. Their flags on the command line follow: ``--match``, ``--reconstruct``."""

RENAMED_FUNCTIONS = {"accelerate": "to_semi_structured"}
"""Names of the package, old name to new name."""
