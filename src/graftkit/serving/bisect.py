"""What is wrong where an engine does not apply an adapter: the site whose part it drops, or the scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.live_adapter import adapted_layers, moved_base
from graftkit.engines.outcome import Outcome, Served
from graftkit.errors import GraftError
from graftkit.progress import Progress
from graftkit.serving.comparing import Bench, Case
from graftkit.serving.reference import log_probabilities
from graftkit.serving.served_form import in_form_of, save_stock

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

# More sites than this are served in groups of the same name in all layers.
_MOST_ALONE = 64
_ROOT = "base_model.model."
# PEFT's containers of the factor that begins with zeros.
_SECOND_FACTORS = ("lora_B", "lora_embedding_B")
_APPLIED = frozenset({Outcome.APPLIED, Outcome.UNKNOWN})


def by_site(
    model: PeftModel,
    bench: Bench,
    folder: Path,
    *,
    as_is: bool,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Served]:
    """Serve the part of each site alone, and return what the engine made of it.

    A part is the whole adapter with the second factor of every other site set to zero: its files keep their form.
    With many sites a part is those of one name in all layers.

    Args:
        model: a LoRA with an effect; its tensors are restored.
        bench: where the whole adapter was served.
        folder: where the parts are written.
        as_is: serve the files as PEFT writes them.

    Returns:
        Site (or name in all layers) -> outcome, in the model's order. Empty where the adapter has one site, or is
        none of which parts can be taken: another method, or one that changes more than its sites.
    """
    parts = _parts(model)
    cases = {}
    for number, (name, layers) in enumerate(parts.items()):
        with _only(model, layers):
            stock = save_stock(model, folder / f"{number}-peft")
            try:
                form = in_form_of(bench.engine, stock, bench.base, folder / f"{number}", as_is=as_is)
            except GraftError:
                return {}  # what the whole was converted by does not take a part: nothing can be said of parts
            cases[name] = Case(form, log_probabilities(model, bench.prefixes))
    return bench.serve(cases, on_progress=on_progress) if cases else {}


def scaled_by(model: PeftModel, bench: Bench, form: Path) -> float | None:
    """Return the factor by which an engine scales the whole update, None where that is not what is wrong.

    What is served is compared with PEFT's outputs under the scales that engines mistake for each other: alpha / r,
    alpha / sqrt(r), one, and the double and half of what is right.

    Args:
        model: a LoRA with an effect; its scales are restored.
        bench: where the whole adapter was served.
        form: the adapter as it was served.
    """
    config: Any = model.active_peft_config
    r, alpha = getattr(config, "r", None), getattr(config, "lora_alpha", None)
    if not r or not alpha:
        return None
    factors = {0.5, 2.0, r**0.5, r**-0.5, r / alpha, alpha / r} - {1.0}
    cases = {}
    for factor in sorted(factors):
        with _scaled(model, factor):
            cases[str(factor)] = Case(form, log_probabilities(model, bench.prefixes))
    found = bench.serve(cases)
    return next((float(name) for name, result in found.items() if result.outcome is Outcome.APPLIED), None)


@contextmanager
def _scaled(model: PeftModel, factor: float) -> Iterator[None]:
    """Multiply the scale of every layer for the block."""
    layers = [layer for layer in adapted_layers(model).values() if hasattr(layer, "scaling")]
    saved = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: scale * factor for name, scale in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scales in zip(layers, saved, strict=True):
            layer.scaling.update(scales)


def first_not_applied(sites: Mapping[str, Served]) -> str | None:
    """Return the first site whose part an engine does not apply, None where each is, or where it is not known."""
    return next((site for site, found in sites.items() if found.outcome not in _APPLIED), None)


def _parts(model: PeftModel) -> dict[str, list[nn.Module]]:
    config: Any = model.active_peft_config
    whole = ("modules_to_save", "trainable_token_indices")
    more = any(getattr(config, name, None) for name in whole) or getattr(config, "bias", "none") != "none"
    if str(config.peft_type.value) != "LORA" or more or moved_base(model) is not None:
        return {}
    sites = {_site(path, layer): [layer] for path, layer in adapted_layers(model).items() if _factors(layer)}
    if len(sites) > _MOST_ALONE:
        groups: dict[str, list[nn.Module]] = defaultdict(list)
        for site, layers in sites.items():
            groups[".".join(site.split(".")[-2:])] += layers
        sites = dict(groups)
    return sites if len(sites) > 1 else {}


def _site(path: str, layer: Any) -> str:
    """Return the path of the base's module or parameter that a layer of PEFT wraps."""
    module = ".".join(part for part in path.removeprefix(_ROOT).split(".") if part != "base_layer")
    parameter = getattr(layer, "parameter_name", None)
    return f"{module}.{parameter}" if parameter else module


def _factors(layer: Any) -> list[Any]:
    containers = (getattr(layer, name, None) or {} for name in _SECOND_FACTORS)
    return [factor for container in containers for factor in container.values()]


@contextmanager
def _only(model: PeftModel, kept: Sequence[nn.Module]) -> Iterator[None]:
    """Set the second factors of all layers but these to zero for the block."""
    import torch

    others = [layer for layer in adapted_layers(model).values() if all(layer is not one for one in kept)]
    tensors = [getattr(factor, "weight", factor) for layer in others for factor in _factors(layer)]
    saved = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, saved, strict=True):
                tensor.copy_(values)
