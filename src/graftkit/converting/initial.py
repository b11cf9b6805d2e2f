"""Updates that depend on the base's weights: adapters whose initializer moved the base, and trained tokens."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Factors, Slice
from graftkit.merging.adapter.effects import Effects, layers_only
from graftkit.merging.adapter.layerwise import lone_layers
from graftkit.merging.arithmetic.changes import PeftLayer, SavedRows, SavedWeight
from graftkit.merging.checkpoint.parameters import read_parameter
from graftkit.planning.matching import value_at

if TYPE_CHECKING:
    import torch

_ADAPTER = "default"


def moved_base(change: PeftLayer, effects: Effects, base: ConvertBase) -> Factors | None:
    """Return the update of a layer whose initializer took its first values out of the base: ``B·A − B0·A0``.

    Its rank is doubled. A0 and B0 are made again by PEFT, from the base's weights.

    Source: ``peft.tuners.lora.model.LoraModel.subtract_mutated_init``.

    Returns:
        None for a layer that is not a plain pair of factors.
    """
    names = {name.rpartition(".lora_")[2]: name for name in change.names}
    if set(names) != {"A.weight", "B.weight"} or change.parameter != "weight":
        return None
    a, b = names["A.weight"], names["B.weight"]
    rank = effects.tensors.shapes[a][0]
    config: Any = effects.config
    alpha = float(value_at(config.alpha_pattern, change.path, config.lora_alpha))
    parameter = f"{change.path}.weight"

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        first_a, first_b = _initial(change.path, config, base)
        own_a, own_b = effects.tensors.read(a).double(), effects.tensors.read(b).double()
        return torch.cat([own_a, first_a]), torch.cat([own_b, -first_b], dim=1)

    return Factors(
        at=Slice(parameter),
        rank=2 * rank,
        shape=base.matrix(parameter),
        scale=alpha / (math.sqrt(rank) if config.use_rslora else rank),
        dtype="F32",
        name=b,
        read=read,
    )


def _initial(path: str, config: Any, base: ConvertBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what PEFT initializes A and B of one layer to, float64."""
    import torch
    from peft import PeftModel

    weights = base.weights
    bare = layers_only(config, ensure_weight_tying=False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        root: Any = lone_layers(base.model, [path], partial(read_parameter, weights))
        adapted: Any = PeftModel(root, bare, adapter_name=_ADAPTER)
        layer = adapted.get_base_model().get_submodule(path)
        return layer.lora_A[_ADAPTER].weight.double(), layer.lora_B[_ADAPTER].weight.double()


def trained_rows(change: SavedRows, parameter: str, effects: Effects, base: ConvertBase) -> Factors:
    """Return trained tokens as a LoRA whose rank is their number: one factor is their change, the other one-hot.

    Tokens are the inputs of the input embeddings and the outputs of the output embeddings.
    Source: ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer.merge``.
    """
    tokens = base.shapes[parameter][0]
    are_inputs = base.inputs_first(parameter)

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        at = torch.tensor(change.at)
        which = torch.zeros(len(at), tokens, dtype=torch.float64)
        which[torch.arange(len(at)), at] = 1
        before = read_parameter(base.weights, parameter)[at].double()
        moved = effects.tensors.read(change.tensor).double() - before
        return (which, moved.T) if are_inputs else (moved, which.T)

    shape = base.matrix(parameter)
    return Factors(Slice(parameter), len(change.at), shape, 1.0, "F32", change.tensor, read)


def is_the_bases(change: SavedWeight, parameter: str, effects: Effects, base: ConvertBase) -> bool:
    """Check whether a weight that was saved whole has the base's own values.

    PEFT saves the embeddings whenever they are adapted.
    Source: ``peft.utils.save_and_load.get_peft_model_state_dict``.
    """
    if not change.tensor.endswith(f".base_layer.{parameter.rpartition('.')[2]}"):
        return False
    saved, own = effects.tensors.read(change.tensor), read_parameter(base.weights, parameter)
    return bool((saved.double() == own.double()).all())
