"""Imports go up the floors and never in a circle, folders stay short, and importing graftkit is light."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import graftkit

ROOT = Path(graftkit.__file__).parent
REPOSITORY = ROOT.parents[1]
MOST_IN_A_FOLDER = 13

# From the ground up: a file imports from its own floor or from floors above it in this list.
FLOORS = (
    ("_version", "errors", "text", "files", "progress", "process"),
    ("findings",),
    ("env",),
    ("families",),
    ("surveying",),
    ("modeling",),
    ("twins",),
    ("planning",),
    ("recipes",),
    ("data",),
    ("attaching",),
    ("adapters",),
    ("merging",),
    ("engines",),
    ("converting",),
    ("checks",),
    ("report",),
    ("serving",),
    ("training",),
    ("matrix",),
    ("demo",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_files(path: Path) -> list[Path]:
    """Return graftkit's files that a file imports: at its top, inside functions or for types alone."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    found = [_file_of(name.split(".")[1:]) for name in names if name.split(".")[0] == "graftkit"]
    return [file for file in found if file in FILES]


def _file_of(parts: list[str]) -> Path:
    """Return the file of a dotted name, which may name something in that file."""
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return file
    return ROOT / "__init__.py"


IMPORTS = {path: imported_files(path) for path in FILES}


def test_no_two_files_import_each_other() -> None:
    graph = {path: {file for file in files if file != path} for path, files in IMPORTS.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(str(file.relative_to(ROOT)) for file in reversed(error.args[1])))


def test_no_folder_is_too_long_to_read() -> None:
    modules = Counter(path.parent.relative_to(ROOT) for path in FILES if path.name != "__init__.py")
    for looked_up_by_name in (Path("families"), Path("cli/commands")):  # one file a family, one a command
        modules.pop(looked_up_by_name)
    assert {str(folder): number for folder, number in modules.items() if number > MOST_IN_A_FOLDER} == {}


def quoted_names(page: str) -> set[str]:
    """Return what a page of the repository has between backticks, outside its code blocks."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_files_and_folders_that_a_page_names_exist(page: str) -> None:
    named = {name for name in quoted_names(page) if re.fullmatch(r"[\w./-]+(\.py|/)", name)}
    rooms = [folder for folder in (ROOT, *ROOT.iterdir()) if folder.is_dir()]
    assert named
    assert {name for name in named if not any((place / name).exists() for place in (*rooms, REPOSITORY))} == set()


def test_the_page_names_every_room() -> None:
    named = quoted_names("docs/architecture.md")
    rooms = {room for room in LEVEL if not room.startswith("_")}
    assert {room for room in rooms if not named & {f"{room}/", f"{room}.py"}} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_up_the_floors(path: Path) -> None:
    here = room_of(path)
    assert here in LEVEL, f"{here} is on no floor"
    below = [room_of(file) for file in IMPORTS[path] if LEVEL[room_of(file)] > LEVEL[here]]
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
        if room_of(path) not in {"families", "engines", "demo"} and _names_a_model(path)
    ]
    assert named == []


def _names_a_model(path: Path) -> bool:
    """Check whether code names one; a file that has no such word anywhere is not parsed for it."""
    words = [word for word in ("Gemma4", "gemma4", "Clippable") if word in path.read_text(encoding="utf-8")]
    return bool(words) and any(word in _code_without_docstrings(path) for word in words)


def _code_without_docstrings(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first.value.value = ""
    return ast.unparse(tree)


def _check_alone(code: str) -> None:
    """Run assertions in a process that has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_help_of_all_commands_builds_none_and_draws_no_box() -> None:
    code = (
        "import sys\nimport graftkit.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'rich', 'markdown_it', 'pygments', 'pydantic', 'yaml'} & set(sys.modules)"
    )
    _check_alone(code)


def test_a_command_imports_no_other() -> None:
    code = (
        "import sys\nimport graftkit.cli.main as m\ntry: m.main(['env'])\nexcept SystemExit: pass\n"
        "commands = 'graftkit.cli.commands.'\n"
        "assert {n for n in sys.modules if n.startswith(commands)} == {commands + 'env'}\n"
        "assert 'rich' not in sys.modules"
    )
    _check_alone(code)


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
    assert set(dir(graftkit)) == set(graftkit.__all__)
