"""Check that the saved adapter is the one in memory, tensor for tensor and bit for bit.

## Why it matters

A file that differs from what was trained is noticed when the training is over and memory is gone.

## Example

Under ZeRO-3 without gathering, every `lora_A.weight` is written with the shape `[0]`; a trainer's overridden
`_save` writes a state dict from before the last steps.

## How safe that is

Saving again changes nothing in memory.

## Sources

- peft: utils.save_and_load.get_peft_model_state_dict
- https://github.com/huggingface/trl/issues/4416
- https://github.com/huggingface/peft/issues/2892
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.probes.live_adapter import adapter_parameters
from graftkit.findings import Severity
from graftkit.modeling.sharding import FSDP_WRAPPER, any_sharded, full_shape, is_shard
from graftkit.text import some

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from graftkit.adapters.file import AdapterFile


def _check(context: CheckContext) -> Observation:
    kept = _Kept.of(context.model, _adapter_in(context.adapter, context.model))
    faults = _faults(context.adapter, kept)
    figures: dict[str, Any] = {
        "tensors": len(context.adapter.tensors),
        "in_memory": len(kept.shapes),
        "compared": _how(context.adapter, kept),
        **{name: len(found) for name, found in faults.items()},
    }
    if any(faults.values()):
        named = [f"{len(found)} {name} ({some(found, 1)})" for name, found in faults.items() if found]
        where = next(found[0] for found in faults.values() if found)
        return failed("not the adapter in memory: " + "; ".join(named), where=where, **figures)
    if not kept.values:
        return passed(f"{len(kept.shapes)} tensors, each of the shape it has in memory", **figures)
    return passed(f"{len(kept.shapes)} tensors, each bit for bit as in memory", **figures)


def _how(file: AdapterFile, kept: _Kept) -> str:
    """Return what was compared: sharded weights of the base have no values on this process."""
    if not kept.values:
        return "names and shapes"
    return "bits" if file.tensors.keys() <= kept.values.keys() else "bits, and names of the base's"


def _adapter_in(file: AdapterFile, model: PeftModel) -> str:
    """Return the adapter's name: PEFT saves one that is not called "default" in a folder of that name."""
    return file.folder.name if file.folder.name in model.peft_config else "default"


@dataclass(frozen=True)
class _Kept:
    """The adapter in memory, under the names of its file.

    Attributes:
        shapes: the shapes of the adapter's tensors.
        names: the names of all tensors, those of the base included: an adapter's file may have some of them.
        values: the tensors that are not sharded.
    """

    shapes: Mapping[str, tuple[int, ...]]
    names: frozenset[str]
    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: PeftModel, adapter: str) -> _Kept:
        if any_sharded(model, adapter_parameters(model).values()):
            shapes = dict(_full_shapes(model, adapter))
            return cls(shapes, frozenset({*shapes, *_names(model, adapter)}), {})
        from peft import get_peft_model_state_dict

        every = model.state_dict()
        # PEFT would gather sharded tensors, for which every process is needed; the adapter's own are not sharded.
        state = {name: tensor for name, tensor in every.items() if not is_shard(tensor)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT has warned when it saved the adapter
            tensors = get_peft_model_state_dict(
                model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
            )
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        # Of embeddings PEFT saves all that lies in their place in memory, frozen originals and copies included.
        named = {_in_file(name, adapter): tensor for name, tensor in state.items()}
        names = frozenset({*(_in_file(name, adapter) for name in every), *tensors})
        return cls(shapes, names, {**named, **tensors})


def _full_shapes(model: PeftModel, adapter: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes from the parameters: gathering the values would need every process."""
    for name, parameter in adapter_parameters(model).items():
        if adapter in name.replace(FSDP_WRAPPER, "").split("."):
            yield _in_file(name, adapter), full_shape(parameter)


def _names(model: PeftModel, adapter: str) -> Iterator[str]:
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        yield _in_file(name, adapter)


def _in_file(name: str, adapter: str) -> str:
    """Return the name that PEFT saves a tensor under."""
    return ".".join(part for part in name.replace(FSDP_WRAPPER, "").split(".") if part != adapter)


def _faults(file: AdapterFile, kept: _Kept) -> dict[str, list[str]]:
    """Return the tensors of the file, or of memory, by what is wrong with them."""
    shapes = {name: header.shape for name, header in file.tensors.items()}
    empty = [name for name, shape in shapes.items() if not math.prod(shape) and name in kept.shapes]
    resized = [n for n, s in shapes.items() if n in kept.shapes and n not in empty and s != kept.shapes[n]]
    same = [name for name in shapes if name in kept.values and name not in {*empty, *resized}]
    return {
        "empty": empty,
        "missing": [name for name in kept.shapes if name not in shapes],
        "of another shape": resized,
        "that memory does not have": [name for name in shapes if name not in kept.names],
        "with other values": _different(file, same, kept.values),
    }


def _different(file: AdapterFile, names: Iterable[str], values: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors whose bits, in the file's dtype, differ from memory. One tensor is read at a time."""
    from safetensors import safe_open

    with safe_open(str(file.weights_path), framework="pt") as opened:
        return [name for name in names if not _same_bits(opened.get_tensor(name), values[name])]


def _same_bits(saved: Tensor, kept: Tensor) -> bool:
    import torch

    now = kept.detach().to(device="cpu", dtype=saved.dtype)
    return now.shape == saved.shape and torch.equal(_bits(now), _bits(saved))


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


RULE = Rule(
    code="GK403",
    title="the saved adapter is the one in memory",
    severity=Severity.ERROR,
    needs=("adapter", "model"),
    check=_check,
    help="save with model.save_pretrained(folder) on the model itself, its parameters gathered on one process",
    since="0.1.0",
)
