"""Classes that a model brings in its own code."""

from __future__ import annotations

from typing import Any

from graftkit.errors import SourceError


def remote_class(reference: str, code: str, revision: str | None) -> Any:
    """Import a class from a model's own code. This runs that code, so the user must have allowed it.

    Args:
        reference: the class as ``auto_map`` names it, ``"modeling_x.XForCausalLM"``.
        code: the hub id or directory that the code lies in.
        revision: the commit of a hub id.

    Raises:
        SourceError: ``remote-code-failed``, where the code cannot be fetched or run.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return get_class_from_dynamic_module(reference, code, revision=revision)
    except Exception as error:
        raise SourceError(
            f"the model's own code does not give {reference}",
            where=code,
            why=f"{type(error).__name__}: {error}",
            help="check that its requirements are installed, and that it supports this transformers",
            code="remote-code-failed",
        ) from error
