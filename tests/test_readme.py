"""The README is run: its shell commands and its Python, on a tiny model instead of the ones it names."""

import ast
import inspect
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fistapruner as fp
import tiny
from fistapruner.cli import build_parser, main
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.settings.parse import shipped_recipes
from fistapruner.settings.prune import Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 200


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def commands(page: str = "README.md", language: str = "sh") -> list[list[str]]:
    lines = (line for block in blocks(language, page) for line in block.replace("\\\n", " ").splitlines())
    return [shlex.split(line, comments=True) for line in lines if line.startswith("fistapruner")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every model and text that the README names is a tiny one."""
    monkeypatch.chdir(tmp_path)
    tiny.save("llama", tmp_path / "my-model", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "text.jsonl").write_text("\n".join(f'{{"text": "{TEXT}"}}' for _ in range(4)))
    pairs = [{"prompt": f"{TEXT[:40]} {number}", "chosen": " a b", "rejected": " c"} for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    monkeypatch.setattr("fistapruner.models.source.small_model", lambda: tmp_path / "no.gguf")
    return tmp_path


def small(arguments: list[str]) -> list[str]:
    """The same command on the tiny model, with few and short windows."""
    words = {"smollm2": "my-model", "meta-llama/Llama-3.2-1B": "my-model", "c4": "text.txt"}
    out = [words.get(word, word) for word in arguments]
    for option, value in (("--samples", "4"), ("--seqlen", "32"), ("--tokens", "4"), ("--prompt", "8")):
        if option in out:
            out[out.index(option) + 1] = value
    if out[0] in ("prune", "compare"):
        out += [word for word in ("--samples=4", "--seqlen=32") if word.partition("=")[0] not in out]
        out += ["--evaluate", "text.txt", "--evaluate-windows", "2"]
    if "--structure" in out:
        out += ["--set", "structure.multiple=8"]
    return out


def test_shell_commands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands()
    assert len(found) >= 5
    for command in found:
        assert main(small(command[1:])) == 0, command


def test_python(place: Path) -> None:
    for block in blocks("python"):
        source = block.replace('"smollm2"', '"my-model"').replace('"seqlen": 512', '"seqlen": 32')
        exec(compile(source, "README.md", "exec"), {})


def test_the_page_on_a_new_solver(capsys: pytest.CaptureFixture[str]) -> None:
    """Its code runs in one namespace, as in a notebook, and prints the page's table but for rounding."""
    names: dict[str, Any] = {}
    for block in blocks("python", "docs/new-solver.md"):
        exec(compile(block, "docs/new-solver.md", "exec", dont_inherit=True), names)
    (shown, *_) = blocks("text", "docs/new-solver.md")
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = [line.split() for line in shown.splitlines()]
    assert [line[0] for line in printed] == [line[0] for line in expected]
    figures = [[float(word.rstrip("%")) for line in lines for word in line[1:]] for lines in (printed, expected)]
    assert figures[0] == pytest.approx(figures[1], rel=0.1)


def test_the_page_on_methods(capsys: pytest.CaptureFixture[str]) -> None:
    """Its example of the core runs without anything from the README."""
    (example,) = blocks("python", "docs/methods.md")
    exec(compile(example, "docs/methods.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 1


def test_python_in_the_documentation_can_be_read() -> None:
    """Of every page; nothing runs."""
    pages = [str(page.relative_to(ROOT)) for page in PAGES]
    found = [compile(block, page, "exec") for page in pages for block in blocks("python", page)]
    assert len(found) >= 8


def test_python_for_other_trainers(place: Path) -> None:
    """The zeros are there after every example."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    small = {"calibration": {"source": "text.txt", "samples": 2, "seqlen": 32}, "method": "magnitude"}
    fp.prune("my-model", "runs/first", **small)
    fp.recover("runs/first", "runs/recovered", parameters="spp", steps=1, data={"tokens": 256, "seqlen": 32})
    model = AutoModelForCausalLM.from_pretrained("runs/first/model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained("my-adapter")
    model = AutoModelForCausalLM.from_pretrained("runs/first/model")
    before = [weight == 0 for weight in model.parameters()]

    def train(model: torch.nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model(torch.ones(1, 4, dtype=torch.long)).logits.float().square().mean().backward()
        optimizer.step()

    names = {
        "model": model,
        "train": train,
        "Trainer": Trainer,
        "arguments": TrainingArguments("trainer", max_steps=1, report_to=[], use_cpu=True),
        "data": [{"input_ids": torch.ones(4, dtype=torch.long), "labels": torch.ones(4, dtype=torch.long)}],
    }
    examples = blocks("python", "docs/recover.md")
    assert examples
    for block in examples:
        exec(compile(block, "docs/recover.md", "exec"), names)
    for folder in ("tuned", "merged"):
        tuned = AutoModelForCausalLM.from_pretrained(folder)
        assert all(bool((weight[zeros] == 0).all()) for weight, zeros in zip(tuned.parameters(), before, strict=True))


def test_commands_in_the_documentation_are_understood() -> None:
    """Flags and verbs of every page; nothing runs."""
    parser = build_parser()
    found = [(page, command) for page in PAGES for command in commands(f"docs/{page.name}", "(?:sh|bash)")]
    assert len(found) >= 30
    for page, command in found:
        try:
            parser.parse_args(command[1:])
        except SystemExit as refused:
            raise AssertionError(f"{page.name}: {command}") from refused


def test_flags_in_the_text_exist() -> None:
    """Also in sentences and tables; those of other programs stand in the set."""
    verbs = next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    known = {flag for verb in verbs.values() for action in verb._actions for flag in action.option_strings}
    torchrun = ("standalone", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint")
    known |= {"--no-deps", "--version", *(f"--{name}" for name in torchrun)}
    for page in (ROOT / "README.md", *(page for page in PAGES if page.name != "reference.md")):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", page.read_text("utf-8")))
        assert named <= known, page.name


def test_pages_stay_within_their_budgets() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.split()) <= 800
    assert len(readme.splitlines()) <= 100
    assert sum(len(page.read_text("utf-8").split()) for page in PAGES if page.name != "reference.md") <= 24_000


def test_the_api_page_shows_docstrings_without_sphinx_roles() -> None:
    """The site's Markdown would show ``:func:`` as text."""
    shown = re.findall(r"^::: fistapruner\.(\w+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE)
    assert shown
    roles = {}
    for name in shown:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(fp, name)))))
        strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        roles[name] = re.findall(r":[a-z]+:`[^`]*`", "\n".join(map(str, strings)))
    assert {name: found for name, found in roles.items() if found} == {}


def test_code_in_tables_has_no_escaped_bars() -> None:
    """The site would show the backslash."""
    pages = [ROOT / "README.md", *PAGES]
    rows = [line for page in pages for line in page.read_text("utf-8").splitlines() if line.startswith("|")]
    assert len(rows) > 100
    assert [row for row in rows if any("\\|" in code for code in re.findall(r"`[^`]*`", row))] == []


def anchors(page: Path) -> set[str]:
    """The places of a page that both GitHub and the site of ``make docs`` let a link lead to."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    headings = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.*)", text, re.MULTILINE))
    words = [re.sub(r"[^\w -]", "", heading).strip().lower() for heading in headings]
    return {each.replace(" ", "-") for each in words} & {re.sub("[- ]+", "-", each) for each in words}


def test_links_lead_to_a_page_and_a_heading() -> None:
    """Those between pages; a page has no two headings of one name that a link leads to."""
    dead = []
    for page in (ROOT / "README.md", *PAGES):
        for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", page.read_text("utf-8")):
            name, _, heading = link.partition("#")
            to = page.parent / name if name else page
            if "://" not in link and (not to.exists() or (heading and heading not in anchors(to))):
                dead.append(f"{page.name}: {link}")
    assert not dead


def test_pages_that_the_source_names_exist() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.yaml"), ROOT / "CONTRIBUTING.md"]
    named = {name for file in files for name in re.findall(r"\bdocs/[\w-]+\.md", file.read_text("utf-8"))}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def figures(page: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield table of the study, row, column and cell of every table that names one."""
    for name, table in re.findall(r"<!-- study: (.*?) -->\s*((?:\|.*\n)+)", (ROOT / page).read_text("utf-8")):
        head, _, *rows = ([cell.strip(" *") for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        yield from (
            (name, row, column, cell) for row, *cells in rows for column, cell in zip(head[1:], cells, strict=True)
        )


@pytest.mark.parametrize(("page", "least"), [("README.md", 15), ("docs/results.md", 150)])
def test_figures_are_those_of_the_study(page: str, least: int) -> None:
    study = json.loads((ROOT / "benchmarks" / "results" / "study.json").read_text("utf-8"))["tables"]
    found = list(figures(page))
    assert len(found) >= least
    for name, row, column, cell in found:
        tables = [study[each]["rows"].get(row, {}) for each in name.split(", ")]  # side by side
        measured = next((table[column] for table in tables if column in table), None)
        if cell or measured is not None:
            number = cell.replace(",", "")
            unit = 10 ** -len(number.partition(".")[2])
            assert float(number) == pytest.approx(measured, abs=0.501 * unit), (name, row, column)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = [line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_run(place: Path, name: str) -> None:
    recipe = Recipe.from_yaml(shipped_recipes()[name], name)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    arguments = ["prune", "my-model", "--out", "run", "--recipe", name, "--calibration", "text.jsonl", "--quiet"]
    assert main(small(arguments)) == 0
    assert not inspect_checkpoint(place / "run" / "model").violations
