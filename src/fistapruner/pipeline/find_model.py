"""Find a model by its name: where a begun run has found it, as long as it is there unchanged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import FistaPrunerError, expand_home, with_name
from ..models.source import SMALL_MODEL, ModelSource, Permissions
from ..runs.decision import PruneRecord
from ..runs.identity import changed_files


def find_source(model: str, record: PruneRecord | None, permissions: Permissions) -> ModelSource:
    """Find a model, that of a begun run where the run has found it as long as it is there unchanged.

    The same name may lead to other files since: to a later commit on the hub, or to what another release of
    ``transformers`` makes of a GGUF file. A local folder, or a GGUF file that has changed, is taken as it is now.

    Args:
        model: as the user named it.
        record: of the begun run; None where nothing has begun.
        permissions: what the model's files may do.

    Raises:
        FistaPrunerError: no such model.
    """
    if record is None:
        return permissions.find(model)
    decision = record.decision
    same = decision.model == model != SMALL_MODEL and not expand_home(model).exists()
    earlier = permissions.at(decision.folder) if same else None
    return _find_again(model, earlier, decision.stamps, record.versions, permissions)


def _find_again(
    model: str,
    earlier: ModelSource | None,
    stamps: Iterable[tuple[str, str]],
    versions: Mapping[str, str],
    permissions: Permissions,
) -> ModelSource:
    """Return a model where a run has found it, if its files are there unchanged; else find it by its name."""
    with suppress(FistaPrunerError):  # it is gone
        if earlier is not None and changed_files(stamps, earlier) is None:
            return earlier
    return permissions.find(model)


def absolute(name: str) -> str:
    """Make a path that exists absolute, so that a run can continue from another folder; keep other names.

    Its last part stays if it is a link: where the link points, a file may have another suffix, as in the hub's cache.
    """
    path = Path(name)
    if not path.exists():
        return name
    path = with_name(path)
    return str(path.parent.resolve() / path.name)


def same_path(before: str | Path, here: str | Path) -> bool:
    """Check that a path in a run's record and one of now are of the same file; other names are only alike."""
    return str(before) == str(here) or (os.path.isabs(before) and os.path.realpath(before) == os.path.realpath(here))


def same_model(first: str, second: str) -> bool:
    """Check whether two names are of one model: equal, or paths to the same file or folder."""
    return first == second or (os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second))
