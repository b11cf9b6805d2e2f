"""SGLang: the classes of its models, and what they say of LoRA."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from graftkit.engines.releases.python_classes import PythonClass, PythonClasses
from graftkit.engines.releases.table import ClassSupport

ENGINE = "sglang"
PACKAGE = "sglang"
_MODELS = "sglang/srt/models"


def read(root: Path) -> Mapping[str, ClassSupport]:
    """Return what the source says of each class that a file of models offers, in its ``EntryClass``.

    Args:
        root: the folder that holds the package ``sglang``.
    """
    classes = PythonClasses(root, (_MODELS,))
    found = {}
    for path in sorted((root / _MODELS).rglob("*.py")):
        file = path.relative_to(root).as_posix()
        for name in _offered(path):
            for cls in classes.near(name, file):
                found[name] = _support(classes, cls)
    return found


def _offered(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="EntryClass")], value=value):
                yield from (inner.id for inner in ast.walk(value) if isinstance(inner, ast.Name))


def _support(classes: PythonClasses, cls: PythonClass) -> ClassSupport:
    packed = classes.value(cls, "packed_modules_mapping")
    return ClassSupport(
        # Most classes say nothing, and its manager asks none of them.
        lora=classes.value(cls, "supports_lora"),
        source=cls.source,
        packed={name: tuple(parts) for name, parts in packed.items()} if isinstance(packed, dict) else None,
    )
