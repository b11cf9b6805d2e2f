"""The classes of a Python package as their source declares them: read with ``ast``, never imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

_ROOTS = frozenset({"Module", "Protocol", "ABC", "Generic", "object"})


@dataclass(frozen=True)
class PythonClass:
    """One class.

    Attributes:
        name: its name.
        file: its file, below the package's folder's parent.
        node: its definition.
    """

    name: str
    file: str
    node: ast.ClassDef

    @property
    def source(self) -> str:
        """File and line."""
        return f"{self.file}:{self.node.lineno}"

    @property
    def bases(self) -> tuple[str, ...]:
        """The names of its bases, without their modules; of a call that makes a base of a class, that class."""
        return tuple(_name(base) for base in self.node.bases)

    @cached_property
    def assigned(self) -> Mapping[str, ast.expr]:
        """The class's own attributes, by name."""
        found: dict[str, ast.expr] = {}
        for node in self.node.body:
            if isinstance(node, ast.Assign):
                found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                found[node.target.id] = node.value
        return found

    @property
    def methods(self) -> frozenset[str]:
        """The names of its own methods."""
        return frozenset(node.name for node in self.node.body if isinstance(node, ast.FunctionDef))


@dataclass(frozen=True)
class PythonClasses:
    """The classes of the files below a folder.

    Attributes:
        root: the folder that holds the package.
        folders: the folders to read, below it; those that are not there are left out.
    """

    root: Path
    folders: tuple[str, ...]

    @cached_property
    def by_name(self) -> Mapping[str, tuple[PythonClass, ...]]:
        """Every class, by its name."""
        found: dict[str, list[PythonClass]] = {}
        for folder in self.folders:
            for path in sorted((self.root / folder).rglob("*.py")):
                file = path.relative_to(self.root).as_posix()
                for node in ast.parse(path.read_text(encoding="utf-8")).body:
                    if isinstance(node, ast.ClassDef):
                        found.setdefault(node.name, []).append(PythonClass(node.name, file, node))
        return {name: tuple(classes) for name, classes in found.items()}

    def near(self, name: str, place: str) -> tuple[PythonClass, ...]:
        """Return the classes of that name in a file, or in its folder: several where platforms differ."""
        folder = f"{place.removesuffix('.py')}/"
        return tuple(c for c in self.by_name.get(name, ()) if c.file == place or c.file.startswith(folder))

    def find(self, name: str, place: str) -> PythonClass | None:
        """Return the class of that name: in a file, in its folder, or the only one there is; None otherwise."""
        folder = f"{place.rpartition('/')[0]}/"
        every = self.by_name.get(name, ())
        for found in (self.near(name, place), [c for c in every if c.file.startswith(folder)], every):
            if len(found) == 1:
                return found[0]
        return None

    def lineage(self, cls: PythonClass) -> Iterator[PythonClass]:
        """Yield a class and what it inherits from, the nearest first; bases outside the package are left out."""
        seen, waiting = set(), [cls]
        while waiting:
            current = waiting.pop(0)
            if current.node in seen:
                continue
            seen.add(current.node)
            yield current
            bases = (self.find(base, current.file) for base in current.bases)
            waiting = [base for base in bases if base is not None] + waiting

    def inherits(self, cls: PythonClass, name: str) -> bool:
        """Check whether a class of that name is among what a class inherits from."""
        return any(name in ancestor.bases for ancestor in self.lineage(cls))

    def is_whole(self, cls: PythonClass) -> bool:
        """Check whether everything that a class inherits from was found, but for the roots of all classes.

        What a function makes of a class may inherit from more than that class.
        """
        every = tuple(self.lineage(cls))
        if any(isinstance(base, ast.Call) for ancestor in every for base in ancestor.node.bases):
            return False
        bases = ((base, ancestor.file) for ancestor in every for base in ancestor.bases)
        return all(base in _ROOTS or self.find(base, file) is not None for base, file in bases)

    def value(self, cls: PythonClass, attribute: str) -> Any:
        """Return a class attribute's literal value, its own or inherited; None where it has none.

        A value that names another class's attribute is followed there.
        """
        for ancestor in self.lineage(cls):
            if attribute in ancestor.assigned:
                return self._literal(ancestor, ancestor.assigned[attribute])
        return None

    def _literal(self, cls: PythonClass, node: ast.expr) -> Any:
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                other = self.find(name, cls.file)
                return None if other is None else self.value(other, attribute)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                one, two = self._literal(cls, left), self._literal(cls, right)
                return {**one, **two} if isinstance(one, dict) and isinstance(two, dict) else None
            case ast.Dict(keys=keys, values=values) if None in keys:
                found: dict[Any, Any] = {}
                for key, value in zip(keys, values, strict=True):
                    read = self._literal(cls, value)
                    found |= (read or {}) if key is None else {ast.literal_eval(key): read}
                return found
        try:
            return ast.literal_eval(node)
        except ValueError:
            return None


def _name(base: ast.expr) -> str:
    match base:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(value=value):
            return _name(value)
        case ast.Call(args=[first, *_]):
            return _name(first)
    return ""
