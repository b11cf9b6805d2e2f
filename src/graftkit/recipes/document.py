"""YAML files with the line of each key, edited without losing their comments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from graftkit.errors import RecipeError, reraise_as
from graftkit.files import write_text
from graftkit.text import closest, first_line, some

# A recipe is a page or two; a dataset or a weight file that is named by mistake must not be read.
_MAX_BYTES = 2**20
Key = tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Document:
    """One YAML 1.2 file, with its comments and order; ``root`` is a mapping."""

    path: Path
    root: Any

    def place(self, key: Key) -> tuple[int, int] | None:
        """Return line and column, from 1, of a key such as ``("args", "packing")``, or of its nearest parent."""
        node: Any = self.root
        found: tuple[int, int] | None = None
        for part in key:
            try:
                marks: Any = node.lc
                line, column = marks.item(part) if isinstance(node, list) else marks.key(part)
                node = node[part]
            except (AttributeError, KeyError, IndexError, TypeError):
                break
            found = (line + 1, column + 1)
        return found

    def where(self, key: Key) -> str:
        """Return the path with line and column of a key, or of its nearest parent in the file."""
        return ":".join(map(str, (self.path, *(self.place(key) or ()))))

    def plain(self) -> dict[str, Any]:
        """Return the content as plain dictionaries and lists."""
        result: dict[str, Any] = _plain(self.root)
        return result

    def write(self, sets: Mapping[Key, Any], removes: Iterable[Key] = ()) -> None:
        """Set and remove keys in the file; everything else stays, comments included.

        Raises:
            OutputError: the file cannot be written; it is then unchanged.
        """
        root = _parse(self.path.read_text(encoding="utf-8"), self.path)
        for key, value in sets.items():
            _parent(root, key)[key[-1]] = value
        for key in removes:
            _parent(root, key).pop(key[-1], None)
        stream = StringIO()
        round_trip_yaml().dump(root, stream)
        write_text(self.path, stream.getvalue())


def read_document(path: str | Path) -> Document:
    """Read a YAML file whose content is a mapping.

    Raises:
        RecipeError: ``recipe-not-found``, or ``recipe-syntax`` with line and column.
    """
    file = Path(path).expanduser()
    try:
        with reraise_as(_unreadable, path):
            if file.stat().st_size > _MAX_BYTES:
                raise _syntax(file, f"it is larger than {_MAX_BYTES:,} bytes")
            text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _syntax(file, "it is not UTF-8 text") from error
    root = _parse(text, file)
    if not isinstance(root, Mapping):
        raise _syntax(file, f"it must be a mapping, not {_kind(root)}")
    return Document(file, root)


def _unreadable(path: str, why: str) -> RecipeError:
    return RecipeError(
        "the recipe cannot be read", where=path, why=why, help=_recipes_beside(path), code="recipe-not-found"
    )


def _recipes_beside(path: str) -> str:
    """Suggest the recipe of the folder with the nearest name; else list them, or say how to write one."""
    file = Path(path).expanduser()
    found = {f.stem: str(f) for end in ("yml", "yaml") for f in sorted(file.parent.glob(f"*.{end}"))}
    if not found:
        return "check the path; graft init writes a first recipe"
    near = closest(file.stem, found)
    return f"did you mean {found[near[0]]}?" if near else f"check the path; there is {some(found.values())}"


def parse_value(text: str, where: str) -> Any:
    """Return a YAML value on one line as plain Python.

    Raises:
        RecipeError: ``recipe-syntax``.
    """
    return _plain(_parse(text, Path(where)))


def _parse(text: str, path: Path) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        return round_trip_yaml().load(text)
    except YAMLError as error:
        raise _from_parser(error, path) from error
    except (ValueError, RecursionError) as error:
        raise _syntax(path, f"{type(error).__name__}: {error}") from error


def _from_parser(error: Any, path: Path) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    why = getattr(error, "problem", None) or first_line(error)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    return RecipeError(
        "the recipe is not valid YAML",
        where=where,
        why=why,
        help="correct it there, or just before: a bracket, a quote or an indentation",
        code="recipe-syntax",
    )


def _syntax(path: Path, why: str) -> RecipeError:
    return RecipeError(
        "this is not a recipe", where=str(path), why=why, help="a recipe is a YAML mapping", code="recipe-syntax"
    )


def round_trip_yaml() -> Any:
    """Return a reader and writer of YAML that keeps comments, quotes and long lines as they are."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def _parent(root: Any, key: Key) -> Any:
    node = root
    for part in key[:-1]:
        if isinstance(node, Mapping) and not isinstance(node.get(part), (Mapping, list)):
            node[part] = {}  # type: ignore[index]
        node = node[part]
    return node


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _kind(value: Any) -> str:
    if value is None:
        return "an empty file"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
