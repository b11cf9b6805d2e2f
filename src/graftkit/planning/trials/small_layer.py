"""One small layer with weights, on which PEFT shows what it refuses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.config.methods import Method, method_named
from graftkit.planning.initializers import Initializer, initializer_of
from graftkit.planning.trials.skeleton import Slot, build, quietly
from graftkit.surveying.sites import Site

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

_SITE = "layers.0.site"
# The quantizer whose layers can be made anywhere, small and without a download.
_TRIED_QUANTIZER = "bitsandbytes 4-bit"
# Divides by every method's default block.
_WIDTH = 256


@functools.cache
def refusal_when_quantized(method_name: str, quantizer: str) -> str | None:
    """Return why the method cannot adapt linears of this ``quantizer``, in PEFT's words, or None.

    Tried on one small layer, with a forward and a backward pass. For other quantizers than bitsandbytes' 4-bit
    nothing is known here, and PEFT decides when the adapter is attached.
    """
    if quantizer != _TRIED_QUANTIZER:
        return None
    method = method_named(method_name)
    if _step_refusal(method, _model("linear", (_WIDTH, _WIDTH))) is not None:
        return None  # it wants something that one bare layer cannot give, quantized or not
    return _step_refusal(method, _quantized_model())


def check_initializer(config: Any, sites: Sequence[Site]) -> None:
    """Refuse an initializer where PEFT would fail with it, or quietly do something else.

    Args:
        config: the plan's configuration.
        sites: the sites it adapts as modules.

    Raises:
        PlanError: ``initializer-kind`` or ``initializer-quantized``.
    """
    init = initializer_of(getattr(config, "init_lora_weights", None))
    if init is None or init.any_kind:
        return
    for site in {site.kind: site for site in reversed(sites)}.values():
        why = _kind_refusal(config, init, site)
        if why is not None:
            raise PlanError(
                f"init_lora_weights={config.init_lora_weights!r} does not work on "
                f"{site.kind.replace('_', ' ')} sites",
                where=site.path,
                why=why,
                help="leave those sites out of the targets, or the initializer",
                code="initializer-kind",
            )
    quantized = next((site for site in sites if site.quantized), None)
    if quantized is not None and (why := _quantized_refusal(config, init, str(quantized.quantized))):
        raise PlanError(
            f"init_lora_weights={config.init_lora_weights!r} does not work on a quantized base",
            where=f"{quantized.path} ({quantized.quantized})",
            why=why,
            help="load the base in 16 or 32 bits, or leave the initializer out",
            code="initializer-quantized",
        )


def _kind_refusal(config: Any, init: Initializer, site: Site) -> str | None:
    if init.needs_data:
        # EVA and CorDA skip what is not a linear; LoRA-GA starts it with B = 0, as plain LoRA.
        return None if site.is_linear else "PEFT collects data for linear layers only"
    small = 16 if len(site.shape) == 2 else 8
    return _attach_refusal(config, _model(site.kind, (small, small, *site.shape[2:])))


def _quantized_refusal(config: Any, init: Initializer, quantizer: str) -> str | None:
    if init.needs_data and init.moves_base:
        return "its preprocessing needs the weights in full precision"
    return _attach_refusal(config, _quantized_model()) if quantizer == _TRIED_QUANTIZER else None


# ---- the trials ----


def _attach_refusal(config: PeftConfig, model: nn.Module) -> str | None:
    """Return what PEFT says when it attaches ``config`` to the small ``model``, or None where it does."""
    from peft import get_peft_model

    tried: Any = copy.deepcopy(config)
    tried.target_modules, tried.target_parameters, tried.task_type = {"site"}, None, None
    tried.r, tried.rank_pattern, tried.alpha_pattern = 4, {}, {}
    tried.modules_to_save = tried.trainable_token_indices = None
    try:
        with quietly():
            get_peft_model(model, tried)
    except Exception as error:
        # Initializers fail with whatever their arithmetic runs into; the messages are PEFT's or torch's. LoftQ
        # quantizes on a GPU: without one here, nothing is known about the machine that will train.
        return None if "CUDA" in str(error) else _message(error)
    return None


def _step_refusal(method: Method, model: nn.Module) -> str | None:
    """Return what goes wrong when ``method`` is put on the small ``model`` and trained for one step, or None."""
    import torch
    from peft import get_peft_model

    try:
        with quietly():
            get_peft_model(model, method.trial_config(target_modules=["site"], **method.options))
            model.get_submodule(_SITE)(torch.randn(2, _WIDTH)).sum().backward()
    except Exception as error:
        # Tuners fail here with whatever their arithmetic on quantized weights runs into.
        return _message(error)
    gradients = (p.grad for p in model.parameters() if p.requires_grad)
    return None if any(g is not None and g.any() for g in gradients) else "no gradient reaches the adapter"


def _message(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- the models ----


def _model(kind: str, shape: tuple[int, ...]) -> nn.Module:
    import torch

    model = build([Slot(_SITE, kind, shape)]).to_empty(device="cpu")
    with quietly():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    return model


def _quantized_model() -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    model = build([Slot(_SITE, "linear", (_WIDTH, _WIDTH))])
    with quietly():
        layer = Linear4bit(_WIDTH, _WIDTH, bias=False).to("cpu")
    model.get_submodule("layers.0").add_module("site", layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model
