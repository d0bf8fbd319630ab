"""The rooms of docs/design.md: who may import whom, how large a module may grow, and what has a docstring."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "babelrs_geo"
FACADE = {"__init__", "__main__"}  # the package's face, which shows what the rooms hold
MODULES = sorted(PACKAGE.rglob("*.py"))
OUTSIDE = {"pipelines", "examples", "benchmarks", "tests"}
INHERITED = {"forward", "train", "convert", "main"}  # methods of torch and click that a base class documents
BANNED = {"utils", "util", "core", "common", "helpers", "misc"}
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "numba",
    "rasterio",
    "geopandas",
    "pandas",
    "pyarrow",
    "xarray",
    "dask",
    "distributed",
    "lightning",
    "torchgeo",
    "transformers",
    "peft",
}


def room_of(path: Path) -> str:
    """The room a file lives in: its module's name, or the package's under which it lies."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Rooms that a module imports anywhere in it, inside functions and for type checking included.

    `package` is the dotted package the module lies in, against which relative imports are resolved.
    """
    rooms = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "babelrs_geo" else [base]
        rooms |= {name.split(".")[1] for name in names if name.startswith("babelrs_geo.")}
    return rooms


def table() -> dict[str, set[str]]:
    """The table of rooms in docs/design.md: room to all that it may import."""
    section = (ROOT / "docs" / "design.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", section, flags=re.MULTILINE)
    allowed = {room: set(re.findall(r"\w+", may)) for room, may in rows}
    everyone = set(allowed)
    return {room: (everyone if "all" in may else may | {"errors"}) - {room} for room, may in allowed.items()}


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_the_reader_of_imports_sees_every_kind():
    source = (
        "import babelrs_geo.scenes\nfrom babelrs_geo import boxes, __version__\n"
        "from babelrs_geo.models.vit import ViT\n"
        "from . import georef\nfrom .tiling import Grid\ndef f():\n    from babelrs_geo.qgis import style\n"
    )
    found = imported_rooms(ast.parse(source), ("babelrs_geo",))
    assert found == {"scenes", "boxes", "__version__", "models", "georef", "tiling", "qgis"}
    inner = imported_rooms(
        ast.parse("from ..boxes import corners\nfrom .vit import ViT"), ("babelrs_geo", "models")
    )
    assert inner == {"boxes", "models"}


def test_every_room_has_its_row_and_every_row_its_room():
    rooms = table()
    assert {room_of(path) for path in MODULES} - FACADE == set(rooms)
    assert set().union(*rooms.values()) <= set(rooms)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_table(path):
    room = room_of(path)
    if room in FACADE:
        return
    package = ("babelrs_geo", *path.relative_to(PACKAGE).parts[:-1])
    arrows = imported_rooms(read(path), package) - {room, "__version__"}
    assert arrows <= table()[room], f"docs/design.md lets {room} import only {sorted(table()[room])}"


def test_the_table_has_no_cycle():
    rooms, settled = table(), set()
    while free := {
        room for room, may in rooms.items() if room not in settled and may & set(rooms) <= settled
    }:
        settled |= free
    assert settled == set(rooms)


def test_nothing_outside_is_imported():
    for path in MODULES:
        for node in ast.walk(read(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & OUTSIDE, path


def test_no_room_for_odds_and_ends():
    assert not {part for path in MODULES for part in path.relative_to(PACKAGE).with_suffix("").parts} & BANNED


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 500
    for node in ast.walk(read(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{path.name}:{node.lineno} {node.name}"
            assert (node.end_lineno or 0) - node.lineno + 1 < 90, where
            arguments = node.args
            named = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
            assert len([name for name in named if name not in ("self", "cls")]) <= 9, where


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_name_has_a_docstring(path):
    tree = read(path)
    assert ast.get_docstring(tree), "a module says what it is for"
    bodies = [(path.stem, tree.body)] + [(n.name, n.body) for n in tree.body if isinstance(n, ast.ClassDef)]
    for owner, body in bodies:
        for node in body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if not public or (owner != path.stem and owner.startswith("_")):
                continue
            inherited = owner != path.stem and node.name in INHERITED
            assert ast.get_docstring(node) or inherited, f"{path.name}:{node.lineno} {owner}.{node.name}"


def test_the_command_line_starts_without_anything_heavy():
    code = f"import babelrs_geo.cli, sys; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
