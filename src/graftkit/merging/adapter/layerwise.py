"""Merge one layer at a time with PEFT itself, for tuners whose update has no closed form here."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.errors import GraftError, MergeError
from graftkit.merging.adapter.effects import Effects, layers_only, shares_state
from graftkit.merging.arithmetic.changes import PeftLayer

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_ADAPTER = "default"

# Reads a parameter of the base, by name, in its stored dtype.
ReadParam = Callable[[str], "torch.Tensor"]


class LayerMerger:
    """Merges layers with PEFT, one at a time whatever the number of threads, and caches the last one.

    A layer is adapted in the base's dtype, because some tuners change, and round, the weight when they are
    attached; then it is merged in double precision, so that the caller rounds once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[int, str, dict[str, torch.Tensor]] | None = None
        self._adapted_together: dict[int, Any] = {}

    def merged(
        self, change: PeftLayer, effects: Effects, model: PreTrainedModel, read: ReadParam
    ) -> dict[str, torch.Tensor]:
        """Return a layer's merged parameters, float64, by their names in the layer.

        Args:
            effects: of the adapter.
            model: the base on the meta device.
            read: reads the base's weights.

        Raises:
            MergeError: ``merge-peft``: PEFT cannot build, load or merge this layer.
        """
        with self._lock:
            if self._last is None or self._last[:2] != (id(effects), change.path):
                with _peft(change.path):
                    layer = self._adapted(change, effects, model, read)
                    self._last = (id(effects), change.path, _merged(layer))
            return self._last[2]

    def _adapted(self, change: PeftLayer, effects: Effects, model: PreTrainedModel, read: ReadParam) -> nn.Module:
        """Return the layer, adapted by PEFT, outside of the model."""
        if not shares_state(effects.config):
            root = lone_layers(model, [change.path], read)
            return _under(_loaded(root, effects, change.tensors), change.path)
        if id(effects) not in self._adapted_together:
            paths = sorted(
                {c.path for changes in effects.changes.values() for c in changes if isinstance(c, PeftLayer)}
            )
            self._adapted_together[id(effects)] = _loaded(lone_layers(model, paths, read), effects, change.tensors)
        return copy.deepcopy(_under(self._adapted_together[id(effects)], change.path))


@contextmanager
def _peft(path: str) -> Iterator[None]:
    import torch

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except GraftError:
        raise  # about a file or a tensor
    except Exception as error:
        raise MergeError(
            "PEFT cannot merge a layer of this adapter",
            where=path,
            why=f"{type(error).__name__}: {error}",
            help="serve the adapter unmerged",
            code="merge-peft",
        ) from error


def lone_layers(model: PreTrainedModel, paths: list[str], read: ReadParam) -> nn.Module:
    """Build a module of only these layers, with their weights, under their paths and in the model's order.

    Args:
        model: the base on the meta device.
        paths: of the layers.
        read: reads the base's weights.
    """
    from torch import nn

    root = nn.Module()
    wanted = set(paths)
    for path, module in model.named_modules():
        if path in wanted:
            _insert(root, path, _real(path, module, read))
    return root


def _insert(root: nn.Module, path: str, layer: nn.Module) -> None:
    from torch import nn

    at = root
    *parents, last = path.split(".")
    for part in parents:
        if part not in at._modules:
            at.add_module(part, nn.Module())
        at = at.get_submodule(part)
    at.add_module(last, layer)


def _real(path: str, module: nn.Module, read: ReadParam) -> nn.Module:
    import torch
    from torch import nn

    layer = copy.deepcopy(module)
    for name, parameter in list(layer.named_parameters()):
        owner = layer.get_submodule(name.rpartition(".")[0])
        value = read(f"{path}.{name}").view(parameter.shape)
        owner._parameters[name.rpartition(".")[2]] = nn.Parameter(value, requires_grad=False)
    for name, buffer in list(layer.named_buffers()):
        owner = layer.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return layer


def _loaded(root: nn.Module, effects: Effects, names: tuple[str, ...]) -> Any:
    """Let PEFT adapt the layers, and load the adapter's values."""
    from peft import PeftModel, set_peft_model_state_dict
    from peft.tuners._buffer_dict import BufferDict
    from torch import nn

    config = layers_only(effects.config, ensure_weight_tying=False, progressbar=False)
    adapted: Any = PeftModel(root, config, adapter_name=_ADAPTER)
    for module in adapted.modules():
        # Only the adapter's own values, so that loading them does not round.
        if isinstance(module, nn.ParameterDict | BufferDict):
            module.double()
    tensors = {name: effects.tensors.read(name) for name in names}
    loaded = set_peft_model_state_dict(adapted, tensors, adapter_name=_ADAPTER)
    if loaded.unexpected_keys:
        raise MergeError(
            "PEFT rejects a tensor of this adapter",
            where=str(loaded.unexpected_keys[0]),
            help="name the base it was trained on",
            code="merge-does-not-fit",
        )
    return adapted.eval()


def _under(adapted: Any, path: str) -> nn.Module:
    return adapted.get_base_model().get_submodule(path)  # type: ignore[no-any-return]


def _merged(layer: Any) -> dict[str, torch.Tensor]:
    """Merge one tuner layer.

    Source: ``peft.tuners.tuners_utils.BaseTuner._unload_and_optionally_merge``, for one layer.
    """
    layer = layer.double()
    if hasattr(layer, "unload_and_optionally_merge_module"):
        merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        layer.merge(safe_merge=False, adapter_names=None)
        merged = layer.get_base_layer()
    return {name: parameter.detach().double() for name, parameter in merged.named_parameters()}
