"""A tokenizer for a twin's vocabulary that transformers and every engine's converter can read."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.families import ServedTwin

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

_SPACE = "▁"
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_LETTERS = [_SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
_MERGES = [("t", "h"), ("th", "e"), (_SPACE, "the"), ("i", "n"), ("a", "n"), ("an", "d"), (_SPACE, "and")]
_UNKNOWN = "<unk>"
_ROLES = ("bos", "eos", "pad")
_FIELD = re.compile(r"_token_(id|index)$")
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tokenizer(config: PretrainedConfig, folder: Path, served: ServedTwin) -> None:
    """Write ``tokenizer.json``, its configuration and a chat template for a model of this configuration.

    It is a BPE model with byte fallback and a sequence of decoders: what llama.cpp's converters take for a
    SentencePiece vocabulary (``LlamaHfVocab`` in gguf/vocab.py), so that no hash of a known vocabulary is needed.

    Args:
        config: says the vocabulary's size and the ids of the special tokens.
        folder: where to write.
        served: the texts of special tokens, and the name of the tokenizer's class, where something reads them.
    """
    from transformers import PreTrainedTokenizerFast

    named = special_tokens(config, served.tokens)
    roles = {f"{role}_token": text for role in _ROLES if (text := named.get(_id(config, role)))}
    fields = {
        _FIELD.sub("_token", field): named[index] for field, index in _token_fields(config) if index in named
    }
    tokenizer = _tokenizer(config.get_text_config().vocab_size, named)
    if served.starts_with_bos:
        _put_first(roles["bos_token"], tokenizer)
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        extra_special_tokens={field: text for field, text in fields.items() if text not in roles.values()},
        **roles,
    )
    saved.chat_template = ("{{ bos_token }}" if served.starts_with_bos else "") + _TEMPLATE
    saved.save_pretrained(folder)
    if served.tokenizer_class is not None:
        _name_class(folder / "tokenizer_config.json", served.tokenizer_class)


def _put_first(token: str, tokenizer: Tokenizer) -> None:
    """Let a tokenizer put a special token before each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )


def _name_class(path: Path, name: str) -> None:
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(saved | {"tokenizer_class": name}, indent=2), encoding="utf-8")


def special_tokens(config: PretrainedConfig, tokens: Mapping[str, str]) -> dict[int, str]:
    """Return the text of every special token by its id, all inside the vocabulary.

    Args:
        config: names ids in its fields (``image_token_id``).
        tokens: the text of a token by the field, or by itself where the configuration has no such field.
    """
    size = config.get_text_config().vocab_size
    found: dict[int, str] = {}
    for field, index in _token_fields(config):
        if index < size:
            found.setdefault(index, tokens.get(field) or f"<{_FIELD.sub('', field)}>")
    fields = {field for field, _ in _token_fields(config)}
    free = (index for index in range(size - 1, -1, -1) if index not in found)
    for text in (text for name, text in tokens.items() if name not in fields):
        found[next(free)] = text
    return _distinct(found)


def _token_fields(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Yield (field, id) of the special tokens that a configuration and those inside it name."""
    for part in (config.get_text_config(), config):
        for field, value in part.to_dict().items():
            if _FIELD.search(field):
                for index in value if isinstance(value, list) else [value]:
                    if isinstance(index, int) and index >= 0:
                        yield field, index


def _distinct(found: Mapping[int, str]) -> dict[int, str]:
    """Return the tokens with a number after a text that an earlier one has."""
    texts: dict[str, int] = {}
    for index, text in sorted(found.items()):
        texts[text if text not in texts else f"{text[:-1]}_{index}>"] = index
    return {index: text for text, index in texts.items()}


def _id(config: PretrainedConfig, role: str) -> Any:
    value = getattr(config.get_text_config(), f"{role}_token_id", None)
    value = getattr(config, f"{role}_token_id", None) if value is None else value
    return value[0] if isinstance(value, list) and value else value


def _tokenizer(size: int, named: Mapping[int, str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    words = [left + right for left, right in _MERGES]
    wanted = iter([_UNKNOWN, *_BYTES, *_LETTERS, *words])
    vocabulary = {named.get(index) or next(wanted, f"<unused{index}>"): index for index in range(size)}
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=_MERGES, unk_token=_UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(list(named.values()))
    return tokenizer
