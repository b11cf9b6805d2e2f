"""The planned sites without their weights, on which PEFT shows what it accepts and how much it trains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.modeling.extensions import own_extension_folder
from graftkit.planning.initializers import moves_base
from graftkit.surveying.sites import ModelMap, Site

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

# Fields that reach beyond the planned sites, or that run on weights: none of them changes what a site can take.
_LEFT_OUT = {
    "task_type": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "ensure_weight_tying": False,
    "progressbar": False,
}


@dataclass(frozen=True, slots=True)
class Slot:
    """What PEFT needs to know of one planned site.

    Attributes:
        path: of the module, or of the parameter for ``kind == "parameter"``.
        bias: whether the module has one.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def inputs(self) -> int:
        """Elements of one input vector of the matrix an adapter sees."""
        if self.kind == "conv1d_transposed":
            return self.shape[0]
        return prod(self.shape[1:]) if self.kind == "conv" else self.shape[-1]

    @property
    def outputs(self) -> int:
        """Elements of one output vector."""
        return self.shape[1] if self.kind == "conv1d_transposed" else self.shape[0]


@dataclass(frozen=True, slots=True)
class Answer:
    """What PEFT did with a configuration on some slots.

    Attributes:
        trainable: trainable elements; None where PEFT refused, or could not tell without the weights.
        refusal: PEFT's message, or None.
        adjusted: PEFT's message where it changed a size it was given, or None.
    """

    trainable: int | None = None
    refusal: str | None = None
    adjusted: str | None = None


def slots_of(model_map: ModelMap, sites: Iterable[Site]) -> list[Slot]:
    """Return the slots of ``sites``, in order."""
    biases = (path.rpartition(".") for path in model_map.parameter_paths)
    biased = {path for path, _, name in biases if name in {"bias", "in_proj_bias"}}
    return [Slot(s.path, s.kind, s.shape, bias=s.path in biased) for s in sites]


def ask(config: PeftConfig, slots: Sequence[Slot]) -> Answer:
    """Attach a copy of ``config`` to ``slots`` on the meta device, and return what PEFT did.

    A few tuners compute with the device their tensors are made on, a few with the base layer's: both ways are
    tried before giving up.
    """
    weightless = _weightless(config)
    for everything_on_meta in (True, False):
        try:
            return _attach(weightless, slots, everything_on_meta)
        except Exception as error:
            # PEFT's tuners refuse with ValueError, TypeError, NotImplementedError, KeyError and AttributeError.
            if not _needs_weights(error):
                return Answer(refusal=_message(error))
    return Answer()


def method_refused(config: PeftConfig, why: str) -> PlanError:
    """Return the error for PEFT's refusal of a configuration on the planned sites."""
    return PlanError(
        f"PEFT cannot put this {type(config).__name__} on the planned sites",
        why=why,
        help="change the option that the message names, or leave those sites out of the targets",
        code="method-refused",
    )


def _attach(config: PeftConfig, slots: Sequence[Slot], everything_on_meta: bool) -> Answer:
    import torch
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    with quietly() as messages:
        model = build(slots)
        with torch.device("meta") if everything_on_meta else nullcontext():
            adapted = get_peft_model(model, copy.deepcopy(config))
    attached = any(isinstance(m, BaseTunerLayer) for m in adapted.modules())
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    adjusted = next((m for m in messages if "Adjusted" in m), None)
    return Answer(trainable if attached else 0, adjusted=adjusted)


@contextmanager
def quietly() -> Iterator[list[str]]:
    """Leave the random state as it was, and collect the warnings: they are repeated on the real model."""
    import torch

    messages: list[str] = []
    with (
        own_extension_folder(),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        yield messages
        messages += [str(w.message) for w in caught]


def _weightless(config: PeftConfig) -> PeftConfig:
    weightless = copy.deepcopy(config)
    for name, value in _LEFT_OUT.items():
        if hasattr(weightless, name):
            setattr(weightless, name, value)
    if moves_base(getattr(weightless, "init_lora_weights", None)):
        weightless.init_lora_weights = True
    return weightless


def _needs_weights(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "meta" in str(error).lower()


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {text}"


# ---- the modules ----


def build(slots: Sequence[Slot]) -> nn.Module:
    """Build a module tree that has ``slots`` at their paths, on the meta device."""
    import torch
    from torch import nn

    root = nn.Module()
    with torch.device("meta"):
        for slot in slots:
            parent_path, _, name = slot.path.rpartition(".")
            parent = _container(root, parent_path)
            if slot.kind == "parameter":
                parent.register_parameter(name, nn.Parameter(torch.empty(slot.shape)))
            else:
                parent.add_module(name, _module(slot))
    return root


def _container(root: nn.Module, path: str) -> nn.Module:
    from torch import nn

    at = root
    for part in filter(None, path.split(".")):
        if part not in at._modules:
            at.add_module(part, nn.Module())
        at = at.get_submodule(part)
    return at


def _module(slot: Slot) -> nn.Module:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    shape = slot.shape
    if slot.kind == "conv":
        convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
        return convolution(shape[1], shape[0], shape[2:], bias=slot.bias)  # type: ignore[no-any-return]
    if slot.kind == "conv1d_transposed":
        return Conv1D(shape[1], shape[0])  # type: ignore[no-any-return]
    if slot.kind == "embedding":
        return nn.Embedding(shape[0], shape[1])
    if slot.kind == "multihead_attention":
        return nn.MultiheadAttention(shape[-1], 1, bias=slot.bias)
    return nn.Linear(shape[1], shape[0], bias=slot.bias)
