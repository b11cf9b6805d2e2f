"""``graftkit.json`` beside an adapter: the base it was trained on, its dialect, and what it should answer.

Stock PEFT does not read the file. It is read here without trusting it: bounded in size and in the length of every
list, and validated field by field.
"""

from __future__ import annotations

import json
import stat
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graftkit.adapters.file import RECORD_NAME
from graftkit.errors import AdapterError, reraise_as
from graftkit.files import write_text
from graftkit.surveying.checkpoint.safetensors_header import parse_json

# Raised when a reader of the older number would misunderstand the file; fields that are only added leave it alone.
RECORD_FORMAT = 1

# Those that graftkit writes have a few kilobytes.
_MAX_RECORD_BYTES = 2_000_000
_MAX_PROBLEMS = 3
_LINE = 100

_Text = Annotated[str, Field(max_length=100_000)]
_Name = Annotated[str, Field(max_length=1_000)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]
_LogProb = Annotated[float, Field(le=1e-3, allow_inf_nan=False)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Section(BaseModel):
    """A part of the record; what a later version adds to it is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Dialect(StrEnum):
    """Whose names and layout the tensors of an adapter have."""

    PEFT = "peft"
    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama.cpp"
    MLX = "mlx"


class TensorSample(_Section):
    """A few bytes of one of the base's tensors.

    Attributes:
        name, dtype, shape: as in the safetensors header.
        digest: hash of a block of its bytes at a fixed place.
        values: a few of its elements at fixed places, empty where its dtype is not a plain floating-point type.
    """

    name: _Name
    dtype: _Name
    shape: Annotated[tuple[int, ...], Field(max_length=64)]
    digest: _Hash
    values: Annotated[tuple[float, ...], Field(max_length=64)] = ()


class Fingerprint(_Section):
    """What tells a base's weight files from others.

    Attributes:
        headers: hash of the names, dtypes and shapes of all tensors.
        content: hash of sampled bytes, since the headers of a base and of its instruction-tuned sibling are equal.
        samples: some tensors by themselves, to know the base by where it was quantized or saved in another dtype.
    """

    headers: _Hash
    content: _Hash
    samples: Annotated[tuple[TensorSample, ...], Field(max_length=256)] = ()


class BaseRecord(_Section):
    """The base that an adapter was trained on.

    Attributes:
        id: hub id or folder.
        revision: commit of a hub id.
        model_type: transformers' name of the architecture.
        quantization: how its weights were quantized in memory while it was trained: "bitsandbytes 4-bit".
        stored_quantization: how its weight files were quantized, as their configuration says: "gptq".
        fingerprint: None where its weight files were not on the machine.
    """

    id: _Name | None = None
    revision: _Name | None = None
    model_type: _Name | None = None
    quantization: _Name | None = None
    stored_quantization: _Name | None = None
    fingerprint: Fingerprint | None = None


class TokenizerRecord(_Section):
    """The tokenizer and the chat template that an adapter was trained with.

    Attributes:
        vocabulary: hash of every token and its id.
        ids: the token ids of a fixed text, as the tokenizer makes them.
        template: hash of the chat template; None without one.
        rendering: a fixed conversation as the template renders it; None where it cannot.
    """

    vocabulary: _Hash
    ids: Annotated[tuple[_TokenId, ...], Field(max_length=4096)] = ()
    template: _Hash | None = None
    rendering: _Text | None = None


class PlanRecord(_Section):
    """What was adapted.

    Attributes:
        method: PEFT's name of it: "LORA".
        r, alpha: those of modules that no pattern names.
        modules: adapted modules.
        parameters: trained parameters.
        targets: role of a weight -> number of adapted modules.
    """

    method: _Name
    r: int | None = None
    alpha: float | None = None
    modules: int | None = None
    parameters: int | None = None
    targets: Annotated[dict[_Name, int], Field(max_length=1_000)] = {}


class Message(_Section):
    """One turn of a conversation."""

    role: _Name
    content: _Text


class ExpectedPrompt(_Section):
    """A prompt, and the log-probabilities of the token that follows it.

    Attributes:
        ids: the prompt's token ids.
        text: the text that the tokenizer makes these ids of; None where there was no tokenizer.
        messages: the conversation that the chat template renders as these ids; empty for a plain text.
        tokens: ids of the most likely next tokens of each of the models below, without repetition.
        pieces: the text of each of these tokens within a text, "" where other tokens of the vocabulary are written
            alike; empty where there was no tokenizer.
        base: log-probability of each of the tokens by the base alone, natural, over the whole vocabulary.
        adapter: the same with the adapter.
        half, double: with the adapter's update times a half and times two; empty where it cannot be scaled.
    """

    ids: Annotated[tuple[_TokenId, ...], Field(min_length=1, max_length=4096)]
    text: _Text | None = None
    messages: Annotated[tuple[Message, ...], Field(max_length=16)] = ()
    tokens: Annotated[tuple[_TokenId, ...], Field(min_length=1, max_length=256)]
    pieces: Annotated[tuple[_Text, ...], Field(max_length=256)] = ()
    base: tuple[_LogProb, ...]
    adapter: tuple[_LogProb, ...]
    half: tuple[_LogProb, ...] = ()
    double: tuple[_LogProb, ...] = ()

    @model_validator(mode="after")
    def _one_number_a_token(self) -> ExpectedPrompt:
        counts = {"base": len(self.base), "adapter": len(self.adapter)}
        optional = {"pieces": len(self.pieces), "half": len(self.half), "double": len(self.double)}
        counts |= {name: number for name, number in optional.items() if number}
        wrong = next((name for name, number in counts.items() if number != len(self.tokens)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} has {counts[wrong]} entries for {len(self.tokens)} tokens")
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError("a token is listed twice")
        return self


class Expected(_Section):
    """What the model that was trained answers.

    Attributes:
        prompts: a handful of short ones.
        dtype: of the computation: "float32".
        device: type of it: "cpu".
    """

    prompts: Annotated[tuple[ExpectedPrompt, ...], Field(min_length=1, max_length=64)]
    dtype: _Name
    device: _Name


class MergedRecord(_Section):
    """That the weights beside the record are a whole model, into which adapters were merged.

    Attributes:
        weights: the factor on the update of each adapter, in order.
    """

    weights: Annotated[tuple[float, ...], Field(max_length=1_000)]


class AdapterRecord(_Section):
    """Everything that ``graftkit.json`` says; each section is None where it is not known.

    Attributes:
        format: the number of this layout.
        dialect: of an adapter's files; None beside a merged model.
        versions: package -> version that trained or signed the adapter.
        unknown: section -> why it was left out.
    """

    format: Literal[1] = 1
    dialect: Dialect | None = None
    base: BaseRecord | None = None
    versions: Annotated[dict[_Name, _Name], Field(max_length=100)] = {}
    tokenizer: TokenizerRecord | None = None
    plan: PlanRecord | None = None
    expected: Expected | None = None
    merged: MergedRecord | None = None
    unknown: Annotated[dict[_Name, _Text], Field(max_length=100)] = {}


def read_record(folder: str | Path) -> AdapterRecord | None:
    """Read the record of an adapter's folder; return None where there is none.

    Raises:
        AdapterError: ``adapter-record``: it cannot be read, is too large, has a later format, or a field without
            a valid value.
    """
    path = Path(folder).expanduser() / RECORD_NAME
    content = _content(path)
    if content is None:
        return None
    try:
        fields, _ = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise _bad_record(path, f"it is not valid JSON: {error}") from error
    number = fields.get("format") if isinstance(fields, dict) else None
    if type(number) is int and number > RECORD_FORMAT:
        raise _bad_record(
            path, f"it has format {number}, and this graftkit reads {RECORD_FORMAT}", "update graftkit"
        )
    try:
        return AdapterRecord.model_validate(fields)
    except ValidationError as error:
        raise _bad_record(path, _first_problems(error)) from error


def write_record(folder: str | Path, record: AdapterRecord) -> Path:
    """Write the record into an adapter's folder, replacing an earlier one; return the file's path.

    Raises:
        OutputError: ``output-not-writable``. An earlier record is then untouched.
    """
    fields = {"format": record.format, **record.model_dump(mode="json", exclude_defaults=True)}
    return write_text(Path(folder).expanduser() / RECORD_NAME, _compact(fields) + "\n")


def mark_dialect(folder: str | Path, dialect: Dialect, record: AdapterRecord | None) -> Path:
    """Write a record into a converted adapter's folder: that of the original, in another dialect."""
    return write_record(folder, (record or AdapterRecord()).model_copy(update={"dialect": dialect}))


def _compact(value: object, depth: int = 0) -> str:
    """Return JSON with one line for each section, prompt and sample: short, and still readable in a diff."""
    line = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if len(line) <= _LINE:
        return line
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        items = (f"{json.dumps(key)}: {_compact(item, depth + 1)}" for key, item in value.items())
        return "{" + ",".join(inner + item for item in items) + outer + "}"
    if isinstance(value, list) and isinstance(value[0], dict):
        items = (json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in value)
        return "[" + ",".join(inner + item for item in items) + outer + "]"
    return line


def _content(path: Path) -> bytes | None:
    """Return the file's bytes, or None where there is no file."""
    with reraise_as(_bad_record, path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Reading a pipe or a device would not end.
        if not stat.S_ISREG(mode):
            raise _bad_record(path, "it is not a regular file")
        with path.open("rb") as file:
            content = file.read(_MAX_RECORD_BYTES + 1)
    if len(content) > _MAX_RECORD_BYTES:
        raise _bad_record(path, f"it is larger than {_MAX_RECORD_BYTES:,} bytes")
    return content


def _first_problems(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in found[:_MAX_PROBLEMS]]
    return "; ".join(shown)


def _bad_record(path: Path | str, why: str, help: str | None = None) -> AdapterError:
    return AdapterError(
        f"no usable {RECORD_NAME}",
        where=str(path),
        why=why,
        help=help
        or "write it again with gk.sign(model, tokenizer, folder), or delete it: the adapter works without",
        code="adapter-record",
    )
