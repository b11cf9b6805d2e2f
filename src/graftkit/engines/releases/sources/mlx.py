"""mlx-lm: the model types that it has a file for, and those that it runs as another."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from graftkit.engines.releases.table import ClassSupport

ENGINE = "mlx"
PACKAGE = "mlx_lm"


def read(root: Path) -> Mapping[str, ClassSupport]:
    """Return what the source has for each model type.

    Args:
        root: the folder that holds the package ``mlx_lm``.
    """
    files = {path.stem: path for path in sorted((root / PACKAGE / "models").glob("*.py"))}
    models = {name: path for name, path in files.items() if _has_model(path)}
    named = {**{name: name for name in models}, **_remapped(root / PACKAGE / "utils.py")}
    return {
        model_type: ClassSupport(True, models[name].relative_to(root).as_posix())
        for model_type, name in named.items()
        if name in models
    }


def _has_model(path: Path) -> bool:
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return {"Model", "ModelArgs"} <= {node.name for node in nodes if isinstance(node, ast.ClassDef)}


def _remapped(path: Path) -> dict[str, str]:
    """Return model type -> the file that runs it, where that has another name."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="MODEL_REMAPPING")], value=value):
                found: dict[str, str] = ast.literal_eval(value)
                return found
    return {}
