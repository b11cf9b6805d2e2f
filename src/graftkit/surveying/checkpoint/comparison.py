"""What a model's class would load from a checkpoint, and what it would not find there, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.surveying.checkpoint.headers import Headers, TensorHeader
from graftkit.surveying.checkpoint.keys import KeyReader
from graftkit.surveying.checkpoint.renaming import find_renaming
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.text import describe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# safetensors' names -> torch's. Any other dtype is packed, and only its shape matters here.
_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
        **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    }
)


@dataclass(frozen=True)
class Absent:
    """What ``from_pretrained`` does not find in the files, in the model's own names.

    Attributes:
        weights: parameters; it draws them at random.
        heads: parameters of a head beside the base model that is absent as a whole, as in a base that is to be
            trained for a new task; at random as well.
        buffers: saved buffers; they keep the value that the class gives them.
    """

    weights: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """What the weight files store, as their headers say, against what the model's class expects.

    Attributes:
        tensors: their number.
        bytes: of all tensor data.
        dtypes: safetensors dtype -> number of tensors.
        unknown: keys in the files that the model's class does not load.
        absent: what the class expects and no file has.
        mismatched: parameters that the files have in another shape; loading them fails.
        renamed: key in the files -> the key under which the class would load it. With these renamings no weight
            is absent; empty where that is not so.
        undecided: why the files could not be compared with the class, or None.
    """

    tensors: int
    bytes: int
    dtypes: tuple[tuple[str, int], ...]
    unknown: tuple[str, ...]
    absent: Absent = Absent()
    mismatched: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    undecided: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "bytes": self.bytes,
            "dtypes": dict(self.dtypes),
            "unknown": list(self.unknown),
            "missing": list(self.absent.weights),
            "missing_heads": list(self.absent.heads),
            "missing_buffers": list(self.absent.buffers),
            "mismatched": list(self.mismatched),
            "renamed": dict(self.renamed),
            "undecided": self.undecided,
        }


def compare(model: PreTrainedModel, headers: Headers) -> Checkpoint:
    """Load the checkpoint as ``from_pretrained`` would, with tensors that have a shape and no data.

    transformers itself decides what is absent: it knows about ties, conversions, and what a class does not need.

    Args:
        model: on any device, for its class, configuration and names; it is not changed.
        headers: of the files.
    """
    reader = KeyReader.of(model)
    unknown = tuple(sorted(key for key in headers if reader.target_of(key)[0] is None))
    seen = Checkpoint(
        tensors=len(headers),
        bytes=headers.total_bytes,
        dtypes=tuple(Counter(tensor.dtype for tensor in headers.values()).most_common()),
        unknown=unknown,
    )
    undecided = _why_undecided(model)
    if undecided is None:
        try:
            return _compared(seen, model, headers)
        except Exception as error:  # whatever a class, or the model's own code, raises while it loads
            undecided = describe(error)
    return replace(seen, undecided=undecided)


def _why_undecided(model: PreTrainedModel) -> str | None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    quantization = model.config.to_dict().get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unknown method")
        return f"the weights are quantized ({method}), and only loading them shows what is missing"
    return "DeepSpeed ZeRO-3 is on" if is_deepspeed_zero3_enabled() else None


def _compared(seen: Checkpoint, model: PreTrainedModel, headers: Headers) -> Checkpoint:
    missing, mismatched = _load(model, headers)
    absent = sort_absent(model, missing)
    renamed: Mapping[str, str] = {}
    if absent.weights:
        found = find_renaming(model, headers, seen.unknown, absent.weights, absent.buffers)
        if found and not sort_absent(model, _load(model, _renamed(headers, found))[0]).weights:
            renamed = found
    return replace(
        seen, absent=absent, mismatched=tuple(sorted(mismatched)), renamed=MappingProxyType(dict(renamed))
    )


def _renamed(headers: Mapping[str, TensorHeader], names: Mapping[str, str]) -> dict[str, TensorHeader]:
    return {names.get(key, key): tensor for key, tensor in headers.items()}


def _load(model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> tuple[set[str], set[str]]:
    """Return the names that ``from_pretrained`` reports as missing, and those of another shape."""
    import torch

    state = {key: torch.empty(t.shape, dtype=_dtype(t.dtype), device="meta") for key, t in headers.items()}
    with quiet_transformers():
        _, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return set(info["missing_keys"]), {name for name, *_ in info["mismatched_keys"]}


def _dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, _DTYPES.get(name, "uint8"))  # type: ignore[no-any-return]


def sort_absent(model: PreTrainedModel, names: Iterable[str]) -> Absent:
    """Sort the names that ``from_pretrained`` reports as missing by what their absence does."""
    missing = sorted(names)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    heads = _new_heads(model, parameters, set(missing))
    return Absent(
        weights=tuple(name for name in missing if name in parameters and _top(name) not in heads),
        heads=tuple(name for name in missing if name in parameters and _top(name) in heads),
        buffers=tuple(name for name in missing if name not in parameters),
    )


def _new_heads(model: PreTrainedModel, parameters: set[str], missing: set[str]) -> set[str]:
    """Return the modules beside the base model of which no parameter was found.

    A class that generates has none that could be meant to be new, and nor are output embeddings.
    """
    if model.base_model is model or model.can_generate():
        return set()
    outputs = model.get_output_embeddings()
    known = {model.base_model_prefix, *(_top(path) for path, module in model.named_modules() if module is outputs)}
    heads = {_top(name) for name in missing & parameters} - known
    return {head for head in heads if all(name in missing for name in parameters if _top(name) == head)}


def _top(name: str) -> str:
    return name.partition(".")[0]
