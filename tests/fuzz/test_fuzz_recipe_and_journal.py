"""Damaged recipes, layer journals and training states: a clean error or a valid recipe; layers and states that are
trusted only when they are whole."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from damage import EXAMPLES, damaged, damaged_json, damaged_json_text, fuzz, json_values
from hypothesis import given, settings
from hypothesis import strategies as st

from fistapruner import FistaPrunerError, Recipe
from fistapruner.runs.directory import LayerJournal
from fistapruner.runs.records import LayerEntry
from fistapruner.runs.store import Snapshots
from fistapruner.settings.parse import shipped_recipes

WHOLE = Recipe.build({"method": "wanda+refit", "ignore": ["re:down"], "allocation": {"re:mlp": "60%"}})
TEXTS = [WHOLE.to_yaml(), *shipped_recipes().values()]
CHARACTERS = st.sampled_from("{}[]:,&*!|>-?#%@`'\"\n\t \x00é0a")


@fuzz
@given(
    st.sampled_from(TEXTS).flatmap(lambda text: damaged(text.encode()))
    | damaged_json(WHOLE.model_dump(mode="json")).map(lambda value: yaml.safe_dump(value).encode())
    | st.lists(CHARACTERS, max_size=40).map(lambda parts: "".join(parts).encode())
)
def test_damaged_recipe(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        recipe = Recipe.from_yaml(text, "recipe x")
    except FistaPrunerError as error:
        assert str(error).startswith("recipe x")  # noqa: PT017
        return
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


ENTRY = LayerEntry(index=0, name="model.layers.0", operators=[])
WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3)}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep thousands of warnings out of pytest's record, and the tests that follow as they were."""
    log = logging.getLogger("fistapruner")
    before = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(before)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerJournal, bytes, bytes, LayerEntry]:
    found = LayerJournal(tmp_path_factory.mktemp("run"))
    found.write("recipe", WEIGHTS, ENTRY)
    tensors, record = found.files(0)
    entry = found.finished(0, "recipe")
    assert entry is not None
    return found, tensors.read_bytes(), record.read_bytes(), entry


@fuzz
@given(st.data())
def test_damaged_layer_is_never_trusted(
    journal: tuple[LayerJournal, bytes, bytes, LayerEntry], data: st.DataObject
) -> None:
    directory, tensors, record, whole = journal
    which = data.draw(st.sampled_from(["tensors", "record"]))
    paths: tuple[Path, Path] = directory.files(0)
    paths[0].write_bytes(data.draw(damaged(tensors)) if which == "tensors" else tensors)
    paths[1].write_bytes(data.draw(damaged(record)) if which == "record" else record)
    entry = directory.finished(0, "recipe")
    if entry is not None:
        assert entry == whole
        assert torch.equal(directory.weights(0).read("a.weight"), WEIGHTS["a.weight"])
    if paths[0].read_bytes() == tensors and paths[1].read_bytes() == record:
        assert entry == whole


VALUES = {"step": 7, "before": 1.5, "best": 1.25, "rate": 0.3, "fault": None}
OLDER, NEWER = 3, 7
TENSOR = torch.arange(256.0)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshots, dict[Path, bytes]]:
    found = Snapshots(tmp_path_factory.mktemp("states"))
    for step in (OLDER, NEWER):
        found.write("run", step, {**VALUES, "step": step}, {"a.weight": step * TENSOR})
    return found, {path: path.read_bytes() for path in found.folder.iterdir()}


@settings(fuzz, max_examples=max(EXAMPLES // 3, 1))
@given(st.data())
def test_damaged_state_is_never_trusted(states: tuple[Snapshots, dict[Path, bytes]], data: st.DataObject) -> None:
    """The one before it is taken, or none where there is none."""
    snapshots, files = states
    alone = data.draw(st.booleans())
    which = data.draw(st.sampled_from([{".safetensors"}, {".json"}, {".safetensors", ".json"}]))
    for path, whole in files.items():
        if int(path.stem) == OLDER and alone:
            path.unlink(missing_ok=True)
        elif int(path.stem) == OLDER or path.suffix not in which:
            path.write_bytes(whole)
        elif path.suffix == ".json":
            text = damaged(whole) | damaged_json_text(json.loads(whole)) | json_values.map(json.dumps).map(str.encode)
            path.write_bytes(data.draw(text))
        else:
            path.write_bytes(data.draw(damaged(whole)))
    found = snapshots.newest("run")
    same = all(path.read_bytes() == whole for path, whole in files.items() if int(path.stem) == NEWER)
    if found is None:
        assert alone
        assert not same
    else:
        assert found.step == NEWER or not (same or alone)
        assert found.values == {**VALUES, "step": found.step}
        assert torch.equal(found.tensors.read("a.weight"), found.step * TENSOR)


def test_nested_aliases_do_not_explode() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    for setting in ("sparsity", "method", "source"):
        with pytest.raises(FistaPrunerError, match="aliases"):
            Recipe.from_yaml(f"{bomb}{setting}: *a11\n")
