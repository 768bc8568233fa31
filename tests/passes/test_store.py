"""Hidden states: the same numbers in memory and in a file, whatever a reader does with what it was given."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fistapruner.passes.store import HiddenStates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_read_is_a_copy(tmp_path: Path, dtype: torch.dtype, on_disk: bool) -> None:
    values = torch.randn(5, 3, 8).to(dtype)
    states = HiddenStates((5, 3, 8), dtype, tmp_path / "states" if on_disk else None)
    states.write(0, values[:2])
    states.write(2, values[2:])
    read = states.read(1, 4)
    assert torch.equal(read, values[1:4])
    read.zero_()
    assert torch.equal(states.read(1, 4), values[1:4])
    assert torch.equal(states.read(0, 5, dtype=torch.float32), values.float())
    states.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 2, 8), (6, 8), (2, 3, 1)])
def test_values_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...], on_disk: bool) -> None:
    states = HiddenStates((5, 3, 8), torch.float32, tmp_path / "states" if on_disk else None)
    with pytest.raises(ValueError, match=r"expected \(count, 3, 8\)"):
        states.write(0, torch.ones(shape))
    states.close()


@pytest.mark.parametrize("on_disk", [False, True])
def test_single_tokens_are_read_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool) -> None:
    values = torch.randn(5, 3, 8).bfloat16()
    states = HiddenStates((5, 3, 8), torch.bfloat16, tmp_path / "states" if on_disk else None)
    states.write(0, values)
    counts: list[int] = []
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        counts.append(preadv(*arguments))
        return counts[-1]

    monkeypatch.setattr("os.preadv", counted)
    for rows in ([0, 4, 5], [2], []):
        assert torch.equal(states.tokens(2, 4, torch.tensor(rows, dtype=torch.int64)), values[2:4].flatten(0, 1)[rows])
    assert sum(counts) == 4 * 8 * 2 * on_disk
    states.close()
