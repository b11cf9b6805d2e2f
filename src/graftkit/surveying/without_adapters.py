"""A model as it was before PEFT put layers into it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def without_adapters(model: nn.Module) -> nn.Module:
    """Return the model itself, or a copy of its modules without PEFT's layers that shares every tensor with it."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    added = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    if not any(isinstance(module, added) for module in base.modules()):
        return base  # type: ignore[no-any-return]
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    plain: nn.Module = copy.deepcopy(base, shared)
    outermost = ""
    # Modules are listed outside in: where one of PEFT's wraps another, as around experts, the outer one counts.
    for path, module in list(plain.named_modules()):
        if isinstance(module, added) and not (outermost and path.startswith(f"{outermost}.")):
            outermost = path
            parent, _, name = path.rpartition(".")
            setattr(plain.get_submodule(parent), name, _original(module))
    return plain


def _original(module: Any) -> Any:
    """Return what PEFT replaced by ``module``, however deep it is wrapped."""
    while (inner := getattr(module, "base_layer", getattr(module, "original_module", None))) is not None:
        module = inner
    return module
