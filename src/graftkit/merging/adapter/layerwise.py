"""One layer at a time through PEFT's own code: for the tuners whose update has no closed form here."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.errors import GraftError, MergeError
from graftkit.merging.adapter.effects import Effects, shares_state
from graftkit.merging.arithmetic.changes import Layer

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_ADAPTER = "default"
# What the layers alone cannot answer, or need not.
_LEFT_OUT = {
    "task_type": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
    "progressbar": False,
    "inference_mode": True,
}

# A parameter of the base by name, as stored.
ReadParam = Callable[[str], "torch.Tensor"]


class LayerShop:
    """Merges layers with PEFT, one at a time however many threads ask, and remembers the last one.

    A layer is adapted in the base's own type, because some tuners change the weight when they start, and round it;
    then it is merged in double precision, so that the caller rounds once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[int, str, dict[str, torch.Tensor]] | None = None
        self._together: dict[int, Any] = {}

    def merged(
        self, change: Layer, effects: Effects, model: PreTrainedModel, read: ReadParam
    ) -> dict[str, torch.Tensor]:
        """A layer's parameters after PEFT's own merge, float64, by their names in the layer.

        Args:
            change: which layer.
            effects: of the adapter.
            model: the base on the meta device.
            read: for the base's weights.

        Raises:
            MergeError: ``merge-peft``: PEFT cannot build, load or merge this layer.
        """
        with self._lock:
            if self._last is None or self._last[:2] != (id(effects), change.path):
                with _peft(change.path):
                    layer = self._adapted(change, effects, model, read)
                    self._last = (id(effects), change.path, _merged(layer))
            return self._last[2]

    def _adapted(self, change: Layer, effects: Effects, model: PreTrainedModel, read: ReadParam) -> nn.Module:
        """The layer as PEFT has adapted it, in a module of its own."""
        if not shares_state(effects.config):
            root = _tree(model, [change.path], read)
            return _under(_loaded(root, effects, change.tensors), change.path)
        if id(effects) not in self._together:
            paths = sorted(
                {c.path for changes in effects.changes.values() for c in changes if isinstance(c, Layer)}
            )
            self._together[id(effects)] = _loaded(_tree(model, paths, read), effects, change.tensors)
        return copy.deepcopy(_under(self._together[id(effects)], change.path))


@contextmanager
def _peft(path: str) -> Iterator[None]:
    import torch

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except GraftError:
        raise  # of a file, or a tensor
    except Exception as error:
        raise MergeError(
            "PEFT cannot merge a layer of this adapter",
            where=path,
            why=f"{type(error).__name__}: {error}",
            help="serve the adapter unmerged",
            code="merge-peft",
        ) from error


def _tree(model: PreTrainedModel, paths: list[str], read: ReadParam) -> nn.Module:
    """These layers with their weights, under their paths, in the order of the model."""
    from torch import nn

    root = nn.Module()
    wanted = set(paths)
    for path, module in model.named_modules():
        if path in wanted:
            _put(root, path, _real(path, module, read))
    return root


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
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
    """The layers, adapted by PEFT, with the adapter's values."""
    from peft import PeftModel, set_peft_model_state_dict

    config = copy.deepcopy(effects.config)
    for name, value in _LEFT_OUT.items():
        if hasattr(config, name):
            setattr(config, name, value)
    adapted = PeftModel(root, config, adapter_name=_ADAPTER)
    for module in adapted.modules():
        # Only the adapter's own values, so that they lose nothing on the way in.
        if _is_adapters(module):
            module.double()
    tensors = {name: effects.tensors.read(name) for name in names}
    loaded = set_peft_model_state_dict(adapted, tensors, adapter_name=_ADAPTER)
    if loaded.unexpected_keys:
        raise MergeError(
            "PEFT does not take a tensor of this adapter",
            where=str(loaded.unexpected_keys[0]),
            help="name the base it was trained on",
            code="merge-does-not-fit",
        )
    return adapted.eval()


def _is_adapters(module: nn.Module) -> bool:
    from peft.tuners._buffer_dict import BufferDict
    from torch import nn

    return isinstance(module, nn.ParameterDict | BufferDict)


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
