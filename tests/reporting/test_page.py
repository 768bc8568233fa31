"""The pages: what they ask for, what they let become markup, their figures and colours; comparisons."""

import itertools
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import samples

from fistapruner.reporting.comparison import comparison_markdown, comparison_page, comparison_table, points
from fistapruner.reporting.figures import HEAT, draw, run_figures
from fistapruner.reporting.page import run_page, write_page
from fistapruner.runs.records import CalibrationTask, Comparison, Lineage, ModelFacts, Report, Stage
from fistapruner.runtime.show import significant

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")


@cache
def pages() -> dict[str, str]:
    """The pages of the samples, drawn once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("FISTAPRUNER_FIGURES", raising=False)
        return {
            "run": run_page(samples.report(4)),
            "recovery": run_page(samples.recovery(4, tasks=True)),
            "comparison": comparison_page(samples.comparison()),
        }


@pytest.fixture
def text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their drawings."""
    monkeypatch.setenv("FISTAPRUNER_FIGURES", "0")


@pytest.mark.parametrize("kind", ["run", "recovery", "comparison"])
def test_a_page_is_one_file_that_asks_for_nothing(kind: str) -> None:
    text = pages()[kind]
    assert "<script" not in text
    assert re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", text) == []
    assert "@import" not in text
    assert [url for url in re.findall(r"url\(([^)]*)\)", text) if not url.startswith("#")] == []
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"#(?:0[1-4]){3}\b|#1100|#2200", text), "a place-holder colour was left in a figure"
    figures = {
        "run": {"error-map", "layer-errors"},
        "recovery": {"training", "change-map"},
        "comparison": {"gap-sparsity"},
    }
    assert set(re.findall(r'<figure id="figure-([\w-]+)"', text)) == figures[kind]


def test_the_same_report_gives_the_same_page() -> None:
    assert run_page(samples.report(4)) == pages()["run"]


@pytest.mark.usefixtures("text_alone")
def test_text_never_becomes_markup() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    report = samples.report(2)
    report.generations[0].prompt = report.generations[0].dense = report.generations[0].pruned = hostile
    report.warnings = [hostile]
    report.command = report.error = report.model.source = hostile
    report.recipe = {"method": hostile, "sparsity": hostile}
    report.layers[0].operators[0].name = hostile
    report.workload.tasks = {hostile: report.workload.tasks["chat"]}
    report.lineage = Lineage(source=ModelFacts(source=hostile), stages=[Stage(settings={"sparsity": hostile})])
    recovered = samples.recovery(2, tasks=True)
    recovered.recovery.parameters = recovered.recovery.loss = recovered.generations[0].recovered = hostile
    recovered.recovery.checks[0].by_task = recovered.recovery.checks[-1].by_task = {hostile: 1.0}
    recovered.calibration.tasks = {hostile: CalibrationTask(source=hostile, how=hostile)}
    compared = samples.comparison()
    compared.model.source = compared.rows[0].method = compared.rows[-1].error = compared.command = hostile
    compared.warnings = [hostile]
    for text in (run_page(report), run_page(recovered), comparison_page(compared)):
        assert "<script" not in text
        assert "&lt;script&gt;" in text


def drawn(report: Report) -> dict[str, Any]:
    """Figures of a run by key."""
    return {drawing.key: drawing for drawing in run_figures(report)}


def test_the_heat_map_has_a_cell_for_every_operator() -> None:
    report = samples.report(4)
    report.layers[1].operators[2].relative_error = None
    drawing = drawn(report)["error-map"]
    names = [operator.name.rpartition(".")[2] for operator in report.layers[0].operators]
    assert list(drawing.head) == ["layer", *names]
    errors = [
        [operator.relative_error and 100 * operator.relative_error for operator in layer.operators]
        for layer in report.layers
    ]
    assert drawing.rows == [[str(index), *map(significant, row)] for index, row in enumerate(errors)]
    assert all(f">{name}<" in drawing.svg for name in names)
    shares = re.findall(r"fill: color-mix\(in srgb, var\(--heat\) (\d+)%", drawing.svg)
    assert len(shares) == 27 + len(HEAT)  # the scale has one for each level


def test_the_experts_of_a_mixture_are_a_column_for_each_kind() -> None:
    """With the largest beside the medians."""
    report = samples.report(8)
    for layer in report.layers:
        gate = layer.operators.pop(4)
        for expert in range(48):
            changed = {"name": f"mlp.experts.{expert}.gate_proj", "relative_error": 0.001 * (expert + 1)}
            layer.operators.append(gate.model_copy(update=changed))
    drawing = drawn(report)["error-map"]
    row = dict(zip(drawing.head, drawing.rows[0], strict=True))
    assert len(row) == 1 + 7 + 1
    assert (row["experts.*.gate_proj"], row["largest"]) == ("2.45", "4.80")
    assert "is the median of a layer's experts" in drawing.caption


def test_figures_of_layers_are_those_of_the_report() -> None:
    report = samples.report(4)
    assert "layer-sparsity" not in drawn(report), "all layers have the same"
    report.layers[2].operators[4].zeros = 0
    found = drawn(report)
    means = [sum(operator.relative_error or 0.0 for operator in at.operators) / 7 for at in report.layers]
    assert found["layer-errors"].rows == [[str(at), significant(100 * mean), "2.00"] for at, mean in enumerate(means)]
    weights = sum(math.prod(operator.shape) for operator in report.layers[0].operators)
    third = significant(50 - 100 * (192 * 64 // 2) / weights, 5)
    assert [row[1] for row in found["layer-sparsity"].rows] == ["50.000", "50.000", third, "50.000"]
    report.recipe = {**report.recipe, "structure": {"remove": "25%"}, "sparsity": "0%"}
    assert "layer-sparsity" not in drawn(report)


def test_names_in_figures_may_have_any_signs() -> None:
    name = "price $5 to $9_x_^{.txt"
    drawing = draw("names", name, lambda figure: figure.text(0.1, 0.5, name), caption=name, description=name)
    assert name in drawing.svg


@pytest.mark.usefixtures("text_alone")
def test_seeds_are_gathered_and_gaps_stand_above_the_lowest() -> None:
    comparison = samples.comparison()
    comparison.rows[1].gap = None  # of wanda at 50 %
    found = {(point.method, point.sparsity): point for point in points(comparison.rows)}
    assert (found["alps", "50%"].seeds, found["alps", "50%"].gap) == (2, pytest.approx(0.605))
    assert ("fista", "50%") not in found
    rows = overview(comparison)
    assert rows[0][:4] == ["dense", "–", "–", "25.32"]
    assert rows[1] == ["alps", "50%", "2", "46.14", "0.605 ± 0.007", "–", "50.0 %", "4 min 06 s"]
    assert rows[2][:6] == ["sparsegpt", "50%", "2", "52.54", "0.735 ± 0.007", "0.130 ± 0.001"]
    assert rows[3][:5] == ["wanda", "50%", "1 of 2", "56.35", "0.800"]
    assert [row[1] for row in rows[1:]] == ["50%"] * 3 + ["70%"] * 3 + ["2:4"] * 3
    text = comparison_page(comparison)
    assert text.count("out of memory") == 1
    assert "</html>" in comparison_page(Comparison())


@pytest.mark.usefixtures("text_alone")
def test_the_weights_that_a_method_keeps_stand_beside_its_gap() -> None:
    comparison = samples.comparison()
    for row in comparison.rows:
        if row.method == "alps" and row.sparsity == "50%":
            row.operator_weights, row.operator_zeros, row.low_rank_weights = 1000, 500, 46
        row.perplexity = None if row.perplexity is None else replace(row.perplexity, window_nlls=())
    assert [row[6] for row in overview(comparison)[1:4]] == ["54.6 %", "50.0 %", "50.0 %"]
    assert overview(comparison)[2][5] == "0.130"  # no error without windows


def overview(comparison: Comparison) -> list[list[str]]:
    """Rows of the first table of a comparison's page."""
    table = comparison_page(comparison).partition("<tbody")[2].partition("</tbody>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]


def test_every_gap_has_a_place_in_its_figure() -> None:
    """On a logarithmic axis these would have none."""
    comparison = samples.comparison()
    comparison.rows[0].gap, comparison.rows[1].gap = 0.0, -0.1
    assert 'id="figure-gap-sparsity"' in comparison_page(comparison)


def test_a_comparison_is_sorted_by_quality_as_text_and_in_markdown() -> None:
    comparison = samples.comparison()
    comparison.rows = [row for row in comparison.rows if row.sparsity == "50%"]
    lines = comparison_table(comparison).splitlines()
    assert [line.split()[0] for line in lines[-9:-2]] == ["alps"] * 2 + ["sparsegpt"] * 2 + ["wanda"] * 2 + ["fista"]
    assert "mean relative error" in lines[2]
    assert " 5.33 % " in lines[-4]
    comparison.rows[0].label = r"wanda@ignore=[re:layers\.[01]\.*mlp*|x]"
    comparison.rows[-1].error = "<b>no</b> memory"
    comparison.dense = replace(comparison.dense, data="a*b*.txt")
    text = comparison_markdown(comparison)
    assert r"| wanda@ignore=\[re:layers\\.\[01\]\\.\*mlp\*\|x\] | 50% |" in text
    assert r"on a\*b\*.txt (test)" in text
    assert r"\<b\>no\</b\> memory" in text


@pytest.mark.usefixtures("text_alone")
def test_write_page_chooses_by_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(samples.report(2).model_dump_json())
    assert write_page(tmp_path) == tmp_path / "report.html"
    (tmp_path / "compare.json").write_text(samples.comparison().model_dump_json())
    assert write_page(tmp_path) == tmp_path / "compare.html"


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_type_and_lines() -> None:
    blocks = re.findall(r":root \{(.*?)\}", pages()["run"], re.DOTALL)
    light, dark = (theme for block in blocks if (theme := dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))))
    assert light.keys() == dark.keys()
    for theme, ground in itertools.product((light, dark), ("surface", "page")):
        for name in ("ink", "muted", "accent", "good", "bad"):
            assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
        for name in (name for name in theme if name.startswith(("series", "heat"))):
            assert contrast(theme[name], theme["surface"]) >= 3, name
