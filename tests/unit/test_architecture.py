"""The house keeps its shape: imports go up the floors only, and importing graftkit is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import graftkit

ROOT = Path(graftkit.__file__).parent

# From the ground up: a file imports from its own floor or from floors above it in this list.
FLOORS = (
    ("_version", "errors", "text", "files", "progress"),
    ("findings",),
    ("env",),
    ("families",),
    ("surveying",),
    ("modeling",),
    ("twins",),
    ("planning",),
    ("recipes",),
    ("attaching",),
    ("adapters",),
    ("merging",),
    ("engines",),
    ("checks",),
    ("report",),
    ("training",),
    ("demo",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graftkit"):
            parts = (node.module or "").split(".")
            found += [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name.split(".")[1] for a in node.names if a.name.startswith("graftkit.")]
    return found


def test_the_page_names_every_file_of_the_checks() -> None:
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = [path.name for path in (ROOT / "checks").glob("*.py") if path.name != "__init__.py"]
    assert [name for name in files if f"`{name}`" not in page] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_up_the_floors(path: Path) -> None:
    here = room_of(path)
    assert here in LEVEL, f"{here} is on no floor"
    below = [room for room in imported_rooms(path) if LEVEL[room] > LEVEL[here]]
    assert not below, f"{here} imports from a room below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_relative_imports(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


def test_model_names_live_in_families_only() -> None:
    """A class or model type of one family, named outside families/, would have to be repeated for the next."""
    named = [
        str(path.relative_to(ROOT))
        for path in FILES
        if room_of(path) not in {"families", "demo"}
        and any(word in _code_without_docstrings(path) for word in ("Gemma4", "gemma4", "Clippable"))
    ]
    assert named == []


def _code_without_docstrings(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first.value.value = ""
    return ast.unparse(tree)


_HEAVY = (
    "import sys; heavy = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules); assert not heavy, heavy"
)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import graftkit", id="import graftkit"),
        pytest.param("import graftkit; dir(graftkit); graftkit.GraftError; graftkit.Severity", id="light names"),
        pytest.param("import graftkit.cli.main", id="import the command"),
        pytest.param("import graftkit.families as f; f.all_families()", id="families are data"),
        pytest.param(
            "import graftkit.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass", id="graft --help"
        ),
        pytest.param(
            "import graftkit.cli.main as m\ntry: m.main(['env'])\nexcept SystemExit: pass", id="graft env"
        ),
    ],
)
def test_light_paths_import_nothing_heavy(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{_HEAVY}"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_public_names_resolve() -> None:
    for name in graftkit.__all__:
        assert getattr(graftkit, name) is not None
    assert callable(graftkit.survey)
    assert callable(graftkit.twin)
    assert callable(graftkit.attach)
