"""Messages whose content is text in some rows and a list of parts in others, stored by ``datasets`` as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")


def keep_json_texts(rows: Dataset) -> Dataset:
    """Turn texts that are valid JSON, such as "6" or "true", into a text part each.

    In a column of mixed content (texts and parts, or texts and the mappings that tools answer) ``datasets`` would
    return a number, a boolean or a mapping for them. A mapping or a list stays what it is in a tool's message. A
    text that is one JSON string loses its quotes: ``datasets`` stores it as it stores the same text without them.
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
    if not any(_is_misread(message) for messages in stored for message in messages or ()):
        return rows
    values = [None if messages is None else [_with_text(message) for message in messages] for messages in stored]
    made = Dataset.from_dict({name: values}, features=Features({name: rows.features[name]}))
    return concatenate_datasets([rows.remove_columns(name), made], axis=1)


def _with_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not _is_misread(message):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _is_misread(message: Mapping[str, Any]) -> bool:
    """Check whether ``datasets`` would return the text of a stored message as something else."""
    if (content := message["content"]) is None:
        return False
    value = _decoded(content)
    if message.get("role") == "tool" and isinstance(value, (Mapping, list)):
        return False
    return not isinstance(value, str) and not _is_parts(value)


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) for part in value)


def _decoded(content: str) -> Any:
    from datasets import Json

    return Json().decode_example(content)
