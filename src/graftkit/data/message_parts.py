"""Messages whose content is text in some rows and a list of parts in others, stored by ``datasets`` as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")


def keep_json_texts(rows: Dataset) -> Dataset:
    """Turn texts that are valid JSON, such as "6" or "true", into a text part each.

    In a column of mixed content ``datasets`` would return a number or a boolean for them. A text that is one JSON
    string loses its quotes: ``datasets`` stores it as it stores the same text without them.
    Source: ``datasets.Json.encode_example``.
    """
    for name in CONVERSATIONS:
        if name in rows.features and _is_mixed(rows.features[name]):
            rows = _kept(rows, name)
    return rows


def _is_mixed(feature: Any) -> bool:
    """Check whether each message's content is stored as JSON."""
    from datasets import Json

    message = getattr(feature, "feature", None)
    return isinstance(message, Mapping) and isinstance(message.get("content"), Json)


def _kept(rows: Dataset, name: str) -> Dataset:
    from datasets import Dataset, Features, concatenate_datasets

    # As stored, content is the text of its JSON.
    stored = rows.select_columns([name]).with_format("arrow")[:][name].to_pylist()
    contents = [message["content"] for messages in stored for message in messages or ()]
    if not any(_is_parts(content) for content in contents) or not any(_is_misread(c) for c in contents):
        return rows
    values = [
        None if messages is None else [{**m, "content": _as_part(m["content"])} for m in messages]
        for messages in stored
    ]
    made = Dataset.from_dict({name: values}, features=Features({name: rows.features[name]}))
    return concatenate_datasets([rows.remove_columns(name), made], axis=1)


def _as_part(content: str | None) -> Any:
    return [{"type": "text", "text": content}] if _is_misread(content) else content


def _is_parts(content: str | None) -> bool:
    value = _decoded(content)
    return isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) for part in value)


def _is_misread(content: str | None) -> bool:
    """Check whether ``datasets`` would return a text as something else."""
    return content is not None and not isinstance(_decoded(content), str) and not _is_parts(content)


def _decoded(content: str | None) -> Any:
    from datasets import Json

    return Json().decode_example(content)
