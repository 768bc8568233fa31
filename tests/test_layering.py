"""The rooms of the package form layers: no import runs upward, there is no circle; and rules of the house."""

import ast
from pathlib import Path

import fistapruner

PACKAGE = Path(fistapruner.__file__).parent

LAYERS = ("errors", "core", "solvers", "runtime", "settings", "models", "passes", "text", "runs", "training")
LAYERS += (
    "allocate",
    "structure",
    "pruning",
    "packed",
    "planning",
    "measure",
    "reporting",
    "verbs",
    "comparison",
    "cli",
)
"""Rooms from low to high. A room may import itself and the rooms before it."""

PLUGGED = {"mamf": "text", "owl": "allocate", "so_ebm": "allocate"}
PLUGGED |= dict.fromkeys(("mezo", "mrpo", "spp", "subzero"), "training")
PLUGGED |= dict.fromkeys(("bypass", "goa"), "structure")
"""The room into which each file of ``papers/`` plugs: it stands in that room's layer."""


VERBS = {
    "training": ("adapters", "alignment", "plan", "recovery", "run", "settle"),
    "pruning": ("run", "settle", "write"),
    "measure": ("run",),
}
"""Modules that are pages of verbs: they stand in a layer of their own."""


def layer_of(path: Path) -> str:
    """Layer of a module of the package, by its path inside it."""
    parts = path.with_suffix("").parts
    if parts[-1] in VERBS.get(parts[0], ()):
        return "verbs"
    return PLUGGED.get(parts[-1], "errors") if parts[0] == "papers" else parts[0]


def imports(path: Path) -> set[str]:
    """Rooms that a module of the package imports, at the top or inside functions."""
    inside = path.relative_to(PACKAGE).parent.parts
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = inside[: len(inside) - (node.level - 1)]
            target = [*base, *(node.module or "").split(".")]
        elif node.module is not None and node.module.split(".")[0] == "fistapruner":
            target = node.module.split(".")[1:]
        else:
            continue
        target = [part for part in target if part]
        if target[:1] == ["papers"]:
            target = [PLUGGED[target[1] if target[1:] else node.names[0].name]]
        rooms |= {target[0]} if target else {alias.name for alias in node.names}
    return rooms


def test_every_room_has_its_layer() -> None:
    rooms = {layer_of(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert rooms - {"__init__", "__main__"} == set(LAYERS)


def test_no_import_runs_upward() -> None:
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = layer_of(path.relative_to(PACKAGE))
        if room not in LAYERS:
            continue
        allowed = {*LAYERS[: LAYERS.index(room) + 1], "__version__"}
        upward += [f"{path.relative_to(PACKAGE)} imports {other}" for other in sorted(imports(path) - allowed)]
    assert not upward


def test_no_circle_inside_a_room() -> None:
    """Modules that import each other at their top can only be read together."""
    arrows: dict[Path, set[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        arrows[path] = set()
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                found = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
                arrows[path] |= {module for module in found if module.is_file()}
    finished: set[Path] = set()

    def visit(module: Path, above: tuple[Path, ...]) -> None:
        assert module not in above, " -> ".join(str(one.relative_to(PACKAGE)) for one in (*above, module))
        if module not in finished:
            for other in sorted(arrows[module]):
                visit(other, (*above, module))
            finished.add(module)

    for module in sorted(arrows):
        visit(module, ())


def test_patterns_are_asked_and_not_told_apart() -> None:
    """Outside of ``core/`` nothing depends on the class of a sparsity pattern."""
    asked = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != "core"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)} & {"Unstructured", "NM"}
    ]
    assert not asked


def test_first_lines_of_docstrings_are_short() -> None:
    """At most 100 characters, so that they can be read in a list."""
    long = [
        f"{path.relative_to(PACKAGE)}: {first}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and len(first := (ast.get_docstring(node) or "").split("\n")[0]) > 100
    ]
    assert not long
