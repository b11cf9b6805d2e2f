"""The proof of a family by PEFT and torch alone: nothing here, and nothing that it calls, is of graftkit.

A model, a batch and a directory with PEFT's own ``adapter_config.json`` go in. What a rule of graftkit gets wrong,
this does not get wrong in the same way.
"""

from __future__ import annotations

import copy
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils import _pytree

# Relative to the largest value of an output: the sums of a merge are in another order, which float64 hardly shows.
_ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-4}
_NOISE = 0.05
_CACHE = re.compile(r"past|cache|mems|kv_states")


@dataclass(frozen=True)
class StockProof:
    """What stock PEFT made of a configuration on a model.

    Attributes:
        dtype: what was computed in: float64, or float32 where the model's code does not run in float64.
        modules, parameters: the paths that PEFT attached to.
        without_gradient: the adapter's tensors that no gradient reached.
        effect: how far the adapter moves the outputs, relative to the largest value of each.
        merged, reloaded: how far merged and reloaded outputs are from the adapted ones, in the same measure.
        not_reloaded: the adapter's tensors that are not what was saved.
    """

    dtype: torch.dtype
    modules: frozenset[str]
    parameters: frozenset[str]
    without_gradient: tuple[str, ...]
    effect: float
    merged: float
    reloaded: float
    not_reloaded: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """What does not hold; empty where all of it does."""
        allowed = _ALLOWED[self.dtype]
        held = {
            f"no gradient: {self.without_gradient[:3]} of {len(self.without_gradient)}": not self.without_gradient,
            f"too little effect to show anything: {self.effect:.1e}": self.effect > 10 * allowed,
            f"merged and adapted differ by {self.merged:.1e}": self.merged <= allowed,
            f"reloaded and adapted differ by {self.reloaded:.1e}": self.reloaded <= allowed,
            f"tensors that did not reload: {self.not_reloaded[:3]}": not self.not_reloaded,
        }
        return [problem for problem, holds in held.items() if not holds]


def prove(model: nn.Module, batch: Mapping[str, Any], config_folder: Path) -> StockProof:
    """Attach, perturb, differentiate, merge, save and reload, with the configuration that PEFT reads from disk.

    The model is not changed.
    """
    double = copy.deepcopy(model).double()
    if _runs(copy.deepcopy(double), _as(batch, torch.float64)):
        return _prove(double, _as(batch, torch.float64), config_folder, torch.float64)
    return _prove(copy.deepcopy(model), dict(batch), config_folder, torch.float32)


def _runs(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Check whether the model's code computes numbers in the type of its weights, backwards too.

    Minus infinity is one: it masks a logit.
    """
    try:
        outputs = _outputs(model, batch)
        _loss(model.requires_grad_(), batch).backward()
    except RuntimeError:  # a kernel that has no float64, or an operation on two types
        return False
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return not any(bool(value.isnan().any()) for value in (*outputs, *gradients))


def _as(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    converted: dict[str, Any] = _pytree.tree_map(
        lambda v: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v, dict(batch)
    )
    return converted


def _prove(base: nn.Module, batch: dict[str, Any], config_folder: Path, dtype: torch.dtype) -> StockProof:
    untouched = copy.deepcopy(base)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        _seed()
        with _without_word_embeddings(base):
            config = PeftConfig.from_pretrained(config_folder)
            adapted = get_peft_model(base, config, autocast_adapter_dtype=False)
        # Not `to`: it takes complex numbers, as of rotations, for real ones.
        tensors = _perturbed((adapted.double() if dtype is torch.float64 else adapted.float()).eval())
        without_gradient = _without_gradient(adapted, batch, tensors)
        with adapted.disable_adapter():
            plain = _outputs(adapted, batch)
        outputs = _outputs(adapted, batch)
        merged = _outputs(copy.deepcopy(adapted).merge_and_unload(), batch)
        adapted.save_pretrained(folder, save_embedding_layers=False)
        with _without_word_embeddings(untouched):
            again = PeftModel.from_pretrained(untouched, folder, autocast_adapter_dtype=False).eval()
        read = dict(again.named_parameters())
        return StockProof(
            dtype=dtype,
            modules=frozenset(adapted.base_model.targeted_module_names),
            parameters=frozenset(adapted.base_model.targeted_parameter_names),
            without_gradient=without_gradient,
            effect=_apart(outputs, plain),
            merged=_apart(outputs, merged),
            reloaded=_apart(outputs, _outputs(again, batch)),
            not_reloaded=tuple(name for name, saved in tensors.items() if not torch.equal(saved, read[name])),
        )


@contextmanager
def _without_word_embeddings(base: Any) -> Iterator[None]:
    """Do what docs/upstream/peft_asks_for_input_embeddings.md tells where a class names no word embeddings."""
    try:
        getattr(base, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        tied = getattr(base.config, "tie_word_embeddings", True)
        base.config.tie_word_embeddings = False  # no word embeddings, so nothing is tied to them
        yield
        base.config.tie_word_embeddings = tied
    else:
        yield


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _perturbed(model: nn.Module) -> dict[str, nn.Parameter]:
    """Add noise to every trainable tensor, so that all of them have an effect, and return them by name."""
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in tensors.values():
            parameter.add_(torch.randn(parameter.shape) * _NOISE)
    return tensors


def _without_gradient(
    model: nn.Module, batch: dict[str, Any], tensors: Mapping[str, nn.Parameter]
) -> tuple[str, ...]:
    """Return the tensors whose gradient is missing, zero or not finite, in both modes of the model."""
    left = _left_without(model, batch, tensors)
    if left:
        trained = copy.deepcopy(model).train()
        named = dict(trained.named_parameters())
        left = _left_without(trained, batch, {name: named[name] for name in left})
    return left


def _left_without(model: nn.Module, batch: dict[str, Any], tensors: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    _loss(model, batch).backward()
    found = {name: parameter.grad for name, parameter in tensors.items()}
    model.zero_grad(set_to_none=True)
    return tuple(n for n, grad in found.items() if grad is None or not grad.any() or not grad.isfinite().all())


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the model's own loss; where it has none, all outputs' sum, each value weighed by a random number."""
    _seed()
    output = _run(model, batch)
    loss: Tensor | None = getattr(output, "loss", None)
    if loss is None:
        weighed = [(value * torch.randn(value.shape)).sum() for value in _values(output) if value.requires_grad]
        loss = torch.stack([value.double() for value in weighed]).sum()
    return loss


@torch.no_grad()
def _outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    _seed()
    return [value.double() for value in _values(_run(model.eval(), batch))]


def _run(model: Any, batch: dict[str, Any]) -> Any:
    """Run the model; one whose class has no forward (Bark) is run by its parts, for which the batch has inputs."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(inner).forward is not nn.Module.forward:
        return model(**batch)
    return {name: getattr(inner, name)(**inputs) for name, inputs in batch.items()}


def _values(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output, without what it keeps for a next call."""
    if isinstance(output, Mapping):
        kept = (value for name, value in output.items() if not _CACHE.search(name))
        return [leaf for value in kept for leaf in _values(value)]
    leaves = _pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]


def _apart(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest finite value of each output.

    It is infinite where shapes differ, where one is infinite and the other is not, and where either is no number.
    """
    if not first or [a.shape for a in first] != [b.shape for b in second]:
        return float("inf")
    apart = [float(_difference(a, b) / _largest(a)) for a, b in zip(first, second, strict=True)]
    return float("inf") if any(value != value for value in apart) else max(apart)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, (a - b).abs()).max()


def _largest(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values.abs(), 0.0).max().clamp_min(1e-12)
