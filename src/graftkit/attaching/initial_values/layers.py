"""The layers of an attached LoRA that adds nothing yet, and the change of its values into an initializer's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import AttachError
from graftkit.modeling.entry import run
from graftkit.modeling.module_mode import evaluating
from graftkit.planning.initializers import initializer_of
from graftkit.planning.matching import smallest_exact
from graftkit.text import percent, some

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


# Largest error of a moved base weight, relative to its norm: bfloat16 itself rounds to about a third of it.
_MOST_LOST = 2**-8


@dataclass(frozen=True)
class PlainLora:
    """An attached LoRA that adds nothing yet.

    Attributes:
        model: carries it.
        config: with the initializer whose values it is to get.
        adapter: PEFT's name for it.
        layers: PEFT's layers by the path of the linear that they wrap, as the base model has it.
    """

    model: PeftModel
    config: LoraConfig
    adapter: str
    layers: Mapping[str, Any]

    @classmethod
    def of(cls, model: PeftModel, config: LoraConfig, adapter: str) -> PlainLora:
        """
        Raises:
            AttachError: ``initialize-kind``: it has layers that are not linear.
        """
        from peft.tuners.lora import LoraLayer
        from torch.nn import Linear
        from transformers.pytorch_utils import Conv1D

        named = model.get_base_model().named_modules()
        found = {path: m for path, m in named if isinstance(m, LoraLayer) and adapter in m.scaling}
        other = next((p for p, m in found.items() if not isinstance(m.get_base_layer(), (Linear, Conv1D))), None)
        if other is not None:
            raise AttachError(
                f"init_lora_weights={config.init_lora_weights!r} is for linear layers only",
                where=other,
                why=f"it is a {type(found[other].get_base_layer()).__name__}, and would start as plain LoRA",
                help="leave those sites out of the targets, or the initializer",
                code="initialize-kind",
            )
        return cls(model, config, adapter, found)

    @property
    def base(self) -> PreTrainedModel:
        """The base model, with PEFT's layers in it."""
        return self.model.get_base_model()

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The linears under PEFT's layers, by the same paths."""
        return {path: layer.get_base_layer() for path, layer in self.layers.items()}

    def rank(self, path: str) -> int:
        return int(self.layers[path].r[self.adapter])

    def set_initializer(self) -> None:
        """Write the initializer, and its own options, into the configuration that PEFT saves."""
        live, init = self.model.peft_config[self.adapter], self.config.init_lora_weights
        for name in ("init_lora_weights", f"{init}_config"):
            if hasattr(self.config, name):
                setattr(live, name, getattr(self.config, name))

    def redraw(self) -> None:
        """Let PEFT give every layer the initializer's values, and take them out of the base weights.

        The base is computed from the values as they are stored, so that it can be computed again from saved ones:
        PEFT's CorDA takes them out before it rounds them to the type of the base.
        """
        for layer in self.layers.values():
            base, dtype = layer.get_base_layer(), layer.lora_A[self.adapter].weight.dtype
            weight = base.weight.data
            rank, alpha = layer.r[self.adapter], layer.lora_alpha[self.adapter]
            layer.update_layer(self.adapter, r=rank, lora_alpha=alpha, config=self.config)
            base.weight.data = weight
            self.keep_state(layer, dtype)
        self.move_base()
        self.set_initializer()

    def move_base(self) -> None:
        """Take what the adapter adds out of every base weight, so that the output stays the same.

        Raises:
            AttachError: ``initialize-rounding``: the type of a weight cannot hold the difference; none is moved.
        """
        for path in self.layers:
            self._moved(path)
        for path, linear in self.linears.items():
            linear.get_parameter("weight").data = self._moved(path)

    def _moved(self, path: str) -> Tensor:
        weight = self.linears[path].get_parameter("weight").data
        added = self.layers[path].get_delta_weight(self.adapter).detach().float()
        moved: Tensor = (weight.float() - added).to(weight.dtype)
        lost = float((moved.float() + added - weight.float()).norm() / weight.float().norm())
        if not lost <= _MOST_LOST:
            raise AttachError(
                f"{self.config.init_lora_weights} would round away {percent(lost)} of a base weight",
                where=path,
                why=f"what it takes out of the weight is large, and {weight.dtype} cannot hold the difference",
                help="load the base in float32 (args: {model_init_kwargs: {dtype: float32}}), lower alpha, or "
                "scale LoRA-GA down: lora_ga_config: {scale: unit}",
                code="initialize-rounding",
            )
        return moved

    def keep_state(self, layer: Any, dtype: Any) -> None:
        """Give the tensors that PEFT has just made the type they had before, and the layer's mode."""
        for modules in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            modules[self.adapter].to(dtype).train(layer.training)


def name_targets(lora: PlainLora) -> None:
    """Name exactly the layers that have a rank in the configuration that PEFT saves.

    PEFT shortens a list of 20 targets and more without regard to those that EVA took off the layers without a rank
    (``peft.tuners.lora.eva._load_eva_state_dict``): loading the adapter would attach to them again.
    """
    paths = [path for path, _ in lora.base.named_modules() if "base_layer" not in path.split(".")]
    kept = [path for path in lora.layers if hasattr(lora.base.get_submodule(path), "lora_A")]
    lora.model.peft_config[lora.adapter].target_modules = smallest_exact(kept, paths, regex_is_safe=False)


def check_reached(reached: Mapping[str, int | bool]) -> None:
    """Check that every path was run.

    Raises:
        AttachError: ``initialize-unreached``.
    """
    missed = [path for path, count in reached.items() if not count]
    if missed:
        raise AttachError(
            f"the batches do not run {len(missed)} of {len(reached)} planned sites",
            where=some(missed, 1),
            why="an adapter there would have nothing to start from",
            help="feed every tower in the scope in every batch, or leave the tower out of the scope",
            code="initialize-unreached",
        )


def check_ranks(lora: PlainLora) -> None:
    """Check that every linear has the directions that the initializer takes for each rank.

    Raises:
        AttachError: ``initialize-rank``.
    """
    row = initializer_of(lora.config.init_lora_weights)
    if row is None or not row.directions:
        return
    for path, layer in lora.layers.items():
        most = row.most_ranks(layer.out_features, layer.in_features)
        if lora.rank(path) > most:
            raise AttachError(
                f"{lora.config.init_lora_weights} cannot give this layer rank {lora.rank(path)}",
                where=path,
                why=f"it has {layer.in_features} inputs and {layer.out_features} outputs: at most rank {most}",
                help=f"r: {most}, or leave the initializer out",
                code="initialize-rank",
            )


def check_unquantized(lora: PlainLora) -> None:
    """Check that the base weights can be moved.

    Raises:
        AttachError: ``initialize-quantized``.
    """
    weights = {path: linear.get_parameter("weight") for path, linear in lora.linears.items()}
    packed = next((path for path, weight in weights.items() if not weight.is_floating_point()), None)
    if packed is not None:
        raise AttachError(
            f"init_lora_weights={lora.config.init_lora_weights!r} does not work on a quantized base",
            where=packed,
            why="it moves part of the base weights into the adapter, and needs them in full precision",
            help="load the base in 16 or 32 bits, or leave the initializer out",
            code="initialize-quantized",
        )


def inputs_of(model: nn.Module, paths: Iterable[str], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of the modules at ``paths`` in one forward pass without gradients."""
    import torch

    seen: dict[str, Any] = {}
    with ExitStack() as hooks, torch.no_grad():
        for path in paths:

            def keep(_module: nn.Module, inputs: Any, _output: Any, path: str = path) -> None:
                seen[path] = inputs

            hooks.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        hooks.enter_context(evaluating(model))
        run(model, batch)
    return seen


@contextmanager
def without_leftovers(modules: Iterable[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Remove what the preprocessing stores on the layers, also where it is interrupted."""
    modules = list(modules)
    try:
        yield
    finally:
        for module in modules:
            for name in names:
                if name in vars(module):
                    delattr(module, name)
