"""Refuse a base whose files lack weights of its class: transformers would go on with random ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from graftkit.errors import SourceError
from graftkit.surveying.checkpoint.comparison import Absent, Checkpoint
from graftkit.text import quoted, some


def check_complete(checkpoint: Checkpoint | None, where: str) -> None:
    """Refuse a base whose weights do not load; what could not be compared is not refused.

    Raises:
        SourceError: ``weights-incomplete``.
    """
    if checkpoint is None:
        return
    if checkpoint.absent.weights or checkpoint.mismatched:
        raise incomplete(checkpoint.absent, where, mismatched=checkpoint.mismatched, renamed=checkpoint.renamed)


def incomplete(
    absent: Absent, where: str, *, mismatched: Collection[str] = (), renamed: Mapping[str, str]
) -> SourceError:
    """Return the error for a base that lacks weights, or has them in another shape.

    Args:
        absent, mismatched: what the files lack.
        where: the base's folder or hub id.
        renamed: as ``Checkpoint.renamed``.
    """
    return SourceError(
        "the base's files do not hold the weights of its class",
        where=where,
        why=why_incomplete(absent, mismatched, renamed),
        help=how_to_complete(where, renamed),
        code="weights-incomplete",
    )


def why_incomplete(absent: Absent, mismatched: Collection[str], renamed: Mapping[str, str]) -> str:
    """Return which weights would be random, and what the files have instead."""
    parts = []
    if absent.weights:
        parts.append(f"{len(absent.weights)} weights are missing, and would be random: {some(absent.weights)}")
    if mismatched:
        parts.append(f"{len(mismatched)} weights have another shape: {some(mismatched)}")
    if renamed:
        key, name = next(iter(renamed.items()))
        parts.append(f"the files have them under other names, as {quoted(key)} for {quoted(name)}")
    if absent.buffers:
        parts.append(f"{len(absent.buffers)} buffers are missing too: {some(absent.buffers)}")
    return "; ".join(parts)


def how_to_complete(where: str, renamed: Mapping[str, str]) -> str:
    """Return the next step: a renaming where that is all, else the files of the original."""
    if renamed:
        return f"`graft rekey {quoted(where)} OUT` writes a copy under the class's names; use that as the base"
    return (
        "fetch the model again, or save it again from where its weights are whole; if they are meant to be new, "
        "load it once with from_pretrained() and save_pretrained() it, so that every run has the same ones"
    )
