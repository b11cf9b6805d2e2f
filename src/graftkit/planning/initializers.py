"""LoRA's initializers: which there are, what each needs, and where each works."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.text import suggest

if TYPE_CHECKING:
    from torch import nn

    from graftkit.surveying.sites import Site

# Those that look at batches of data first (``graftkit.initialize``).
DATA_DRIVEN = ("eva", "corda", "lora_ga")

# The field that configures an initializer, and PEFT's class for it; PEFT stores LoftQ's as a plain mapping.
_NEEDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "loftq": ("loftq_config", "LoftQConfig"),
        "eva": ("eva_config", "EvaConfig"),
        "corda": ("corda_config", "CordaConfig"),
        "lora_ga": ("lora_ga_config", "LoraGAConfig"),
    }
)
_FAST_SVD = r"pissa_niter_\d+"

# The quantizer whose layers can be made here, small and without a download.
_TRIED_QUANTIZER = "bitsandbytes 4-bit"


def names() -> tuple[str, ...]:
    """The named initializers of the installed PEFT, from its configuration class."""
    from peft import LoraConfig

    hint = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    literals = [name for arm in typing.get_args(hint) for name in typing.get_args(arm)]
    configured = [name for name, (option, _) in _NEEDS.items() if option in LoraConfig.__dataclass_fields__]
    return tuple(dict.fromkeys([*literals, *configured]))


def completed(init: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that ``init`` needs, with PEFT's defaults, where the user gave none.

    Raises:
        PlanError: ``initializer-unknown``.
    """
    if not isinstance(init, str):
        return {}
    known = names()
    if (init not in known or "[" in init) and not re.fullmatch(_FAST_SVD, init):
        raise PlanError(
            f"unknown initializer {init!r}",
            where="init_lora_weights",
            why=f"PEFT has True, False, {', '.join(known)}",
            help=suggest(init, known) or "leave it out for LoRA's own",
            code="initializer-unknown",
        )
    option, class_name = _NEEDS.get(init, ("", ""))
    if not option or options.get(option):
        return {}
    from peft.tuners.lora import config

    return {option: getattr(config, class_name)()}


def check_initializer(config: Any, sites: Sequence[Site]) -> None:
    """Refuse an initializer where PEFT would fail with it, or quietly do something else.

    Args:
        config: the plan's configuration.
        sites: the sites it adapts as modules.

    Raises:
        PlanError: ``initializer-kind`` or ``initializer-quantized``.
    """
    init = getattr(config, "init_lora_weights", None)
    if not isinstance(init, str) or init == "gaussian":
        return
    for kind in dict.fromkeys(site.kind for site in sites):
        why = _refusal(config, init, next(site for site in sites if site.kind == kind))
        if why is not None:
            site = next(site for site in sites if site.kind == kind)
            raise PlanError(
                f"init_lora_weights={init!r} does not work on {kind.replace('_', ' ')} sites",
                where=site.path,
                why=why,
                help="leave those sites out of the targets, or the initializer",
                code="initializer-kind",
            )
    quantized = next((site for site in sites if site.quantized), None)
    if quantized is not None and (why := _refusal_when_quantized(config, init, str(quantized.quantized))):
        raise PlanError(
            f"init_lora_weights={init!r} does not work on a quantized base",
            where=f"{quantized.path} ({quantized.quantized})",
            why=why,
            help="load the base in 16 or 32 bits, or leave the initializer out",
            code="initializer-quantized",
        )


def _refusal(config: Any, init: str, site: Site) -> str | None:
    if init in DATA_DRIVEN:
        # EVA and CorDA pass over what is not a linear; LoRA-GA starts it with B = 0, as plain LoRA.
        linear = site.is_linear
        return None if linear else "PEFT collects data for linear layers only"
    from graftkit.planning.skeleton import Slot, build

    small = 16 if len(site.shape) == 2 else 8
    slot = Slot("layers.0.site", site.kind, (small, small, *site.shape[2:]))
    return _tried(config, build([slot]).to_empty(device="cpu"), rank=4)


def _refusal_when_quantized(config: Any, init: str, quantizer: str) -> str | None:
    if init in {"corda", "lora_ga"}:
        return "its preprocessing needs the weights in full precision"
    if quantizer != _TRIED_QUANTIZER:
        return None
    from bitsandbytes.nn import Linear4bit
    from torch import nn

    root = nn.Module()
    root.add_module("site", Linear4bit(64, 64, bias=False).to("cpu"))
    root.is_loaded_in_4bit = True  # type: ignore[assignment]
    return _tried(config, root, rank=4)


def _tried(config: Any, model: nn.Module, rank: int) -> str | None:
    """What PEFT says when it initializes one small layer, or None where it does."""
    import copy
    import warnings

    import torch
    from peft import get_peft_model

    tried = copy.deepcopy(config)
    tried.target_modules, tried.target_parameters, tried.task_type = {"site"}, None, None
    tried.r, tried.rank_pattern, tried.alpha_pattern = rank, {}, {}
    tried.modules_to_save = tried.trainable_token_indices = None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dim() > 1:
                torch.nn.init.normal_(parameter)
        try:
            get_peft_model(model, tried)
        except Exception as error:
            # Initializers fail with whatever their arithmetic runs into; the words are PEFT's or torch's. LoftQ
            # quantizes on a GPU: without one here, nothing is known about the machine that will train.
            if "CUDA" in str(error):
                return None
            return " ".join(str(error).split())
    return None
