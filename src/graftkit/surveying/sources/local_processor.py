"""A model's processor or tokenizer, if it is on this machine, and its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from graftkit.surveying.sources.quiet import quiet_transformers


def local_processor(source: Any, *, trust_remote_code: bool = False, revision: str | None = None) -> Any | None:
    """Return the processor of a model, else its tokenizer; None without one. Nothing is downloaded.

    Args:
        source: a hub id or a folder; nothing else has a processor.
        trust_remote_code: let the processor's own code run.
        revision: branch, tag or commit of a hub id.
    """
    from transformers import AutoProcessor, AutoTokenizer

    if not isinstance(source, (str, Path)):
        return None
    for loader in (AutoProcessor, AutoTokenizer):
        with suppress(Exception), quiet_transformers():
            return loader.from_pretrained(
                str(source),
                trust_remote_code=trust_remote_code,
                revision=revision or "main",
                local_files_only=True,
            )
    return None


def template_of(processor: Any) -> str | None:
    """Return the chat template of a tokenizer or processor, its default one if it has several."""
    for owner in (processor, tokenizer_of(processor)):
        template = getattr(owner, "chat_template", None)
        template = template.get("default") if isinstance(template, Mapping) else template
        if isinstance(template, str):
            return template
    return None


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor; a tokenizer as it is."""
    return getattr(processor, "tokenizer", processor)
