"""vLLM: the registry of its models, and the class attributes that its LoRA manager reads."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from graftkit.engines.releases.python_classes import PythonClass, PythonClasses
from graftkit.engines.releases.table import ClassSupport

ENGINE = "vllm"
PACKAGE = "vllm"
_MODELS = "vllm/model_executor/models"
# What drafts tokens for another model is never a base of its own.
_DRAFTS = "_SPECULATIVE_DECODING_MODELS"


def read(root: Path) -> Mapping[str, ClassSupport]:
    """Return what the source says of each architecture of the registry.

    Args:
        root: the folder that holds the package ``vllm``.
    """
    classes = PythonClasses(root, (_MODELS, "vllm/models"))
    found = {}
    for architecture, (module, name) in _registry(root / _MODELS / "registry.py").items():
        near = f"{module.replace('.', '/')}.py" if "." in module else f"{_MODELS}/{module}.py"
        of_platforms = [_support(classes, cls) for cls in classes.near(name, near)]
        if of_platforms:
            found[architecture] = _agreed(of_platforms)
    return found


def _agreed(of_platforms: list[ClassSupport]) -> ClassSupport:
    """Return what the classes of several platforms have in common; nothing is known where they differ."""
    first = of_platforms[0]
    if all(replace(support, source=first.source) == first for support in of_platforms):
        return first
    return ClassSupport(None, first.source)


def _registry(path: Path) -> dict[str, tuple[str, str]]:
    """Return architecture -> (module, class), from the dictionaries of the registry."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if _DRAFTS in names or not any(name.endswith("_MODELS") for name in names):
            continue
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                found[str(key.value)] = ast.literal_eval(value)
    return found


def _support(classes: PythonClasses, cls: PythonClass) -> ClassSupport:
    lora = classes.inherits(cls, "SupportsLoRA") or classes.value(cls, "supports_lora") is True
    seen = classes.inherits(cls, "SupportsMultiModal")
    if not lora:
        return ClassSupport(False if classes.is_whole(cls) else None, cls.source)
    embeddings = tuple(classes.value(cls, "embedding_modules") or ())
    packed = classes.value(cls, "packed_modules_mapping") or {}
    return ClassSupport(
        True,
        cls.source,
        packed={name: tuple(parts) for name, parts in packed.items()},
        # A class of several modalities holds a language model of another class, which may name some.
        embeddings=embeddings if embeddings or not seen else None,
        towers=classes.value(cls, "supports_tower_connector_lora") is True if seen else None,
        stacked=True if classes.value(cls, "is_3d_moe_weight") is True else None,
    )
