"""Messages whose content is here a text and there a list of parts, which ``datasets`` keeps as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")


def texts_kept(rows: Dataset) -> Dataset:
    """The rows with texts that are JSON themselves, such as "6" or "true", as a part of text each.

    In a column of mixed contents ``datasets`` would give back a number or a truth value for them. A text that is
    one JSON string, quotes and all, cannot be told from the same without its quotes, and loses them.
    Source: ``datasets.Json.encode_example``.
    """
    for name in CONVERSATIONS:
        if name in rows.features and _is_mixed(rows.features[name]):
            rows = _kept(rows, name)
    return rows


def _is_mixed(feature: Any) -> bool:
    """Whether each message's content is JSON by itself."""
    from datasets import Json

    message = getattr(feature, "feature", None)
    return isinstance(message, Mapping) and isinstance(message.get("content"), Json)


def _kept(rows: Dataset, name: str) -> Dataset:
    from datasets import Dataset, Features, concatenate_datasets

    # As it is stored: a content is the text of its JSON.
    told = rows.select_columns([name]).with_format("arrow")[:][name].to_pylist()
    contents = [message["content"] for messages in told for message in messages or ()]
    if not any(_is_parts(content) for content in contents) or not any(_is_misread(c) for c in contents):
        return rows
    values = [
        None if messages is None else [{**m, "content": _in_parts(m["content"])} for m in messages]
        for messages in told
    ]
    made = Dataset.from_dict({name: values}, features=Features({name: rows.features[name]}))
    return concatenate_datasets([rows.remove_columns(name), made], axis=1)


def _in_parts(content: str | None) -> Any:
    return [{"type": "text", "text": content}] if _is_misread(content) else content


def _is_parts(content: str | None) -> bool:
    value = _decoded(content)
    return isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) for part in value)


def _is_misread(content: str | None) -> bool:
    """Whether a text would come back as something else."""
    return content is not None and not isinstance(_decoded(content), str) and not _is_parts(content)


def _decoded(content: str | None) -> Any:
    from datasets import Json

    return Json().decode_example(content)
