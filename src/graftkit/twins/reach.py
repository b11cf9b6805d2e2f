"""Which sites of a small model get no gradient from what it computes on a batch, and why."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from graftkit.modeling.module_mode import evaluating, in_training_mode
from graftkit.modeling.outputs import loss_of
from graftkit.modeling.random_state import seeding
from graftkit.surveying import kinds
from graftkit.surveying.survey import survey
from graftkit.twins.weights import redraw_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftkit.surveying.sites import Site

# Weights are drawn this often: a unit that is never positive, an expert that no token chooses and a softmax that
# one key wins are chance.
_DRAWS = 3


class NoGradient(Enum):
    """Why no gradient reaches an adapter on a site. The value is the reason that people read."""

    NOT_CALLED = "nothing calls it on the batch that was tried"
    READ_PAST = "its weight is read without calling what stands in its place"
    NOT_READ = "what it computes does not reach the loss"
    ONLY_CHOOSES = "it only decides a choice (a rank, a rounding) or a value taken as fixed"


def unreached(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, NoGradient]:
    """Return the adaptable sites of a small model that get no gradient on ``batch``, and why, by path.

    The loss is the model's own, or that of ``loss_over`` where it computes none. A site counts as unreached
    where it is so with the model's weights, with two other draws of them, and in training mode, in which some
    classes run more of their layers. The model and torch's random state do not change.

    Args:
        model: a small model without adapters, as ``twin`` builds it: it is copied.
        batch: what its forward takes.
    """
    probe = copy.deepcopy(model)
    with evaluating(probe):
        left, passes = _tried(probe, batch)
        causes = {site.path: _cause(probe, batch, site, passes) for site in left}
    # A row that is looked up without a gradient is the padding's: other rows have one in other batches.
    padding = {site.path for site in left if site.kind == kinds.EMBEDDING}
    return {p: c for p, c in causes.items() if p not in padding or c is not NoGradient.ONLY_CHOOSES}


def without_gradient(model: nn.Module, batch: Mapping[str, Any]) -> list[Site]:
    """Return the adaptable sites that get no gradient on ``batch``, in evaluation mode and with its weights."""
    probe = copy.deepcopy(model)
    sites = _sites(probe)
    with evaluating(probe):
        return _unreached(sites, [_backward(probe, batch, sites)])


@dataclass(frozen=True)
class _Pass:
    """What one backward pass reached: the modules that ran, and the sites whose weights got a gradient."""

    called: frozenset[str]
    trained: frozenset[str]

    def reaches(self, site: Site) -> bool:
        return site.path in self.trained and (site.kind == kinds.PARAMETER or site.path in self.called)


def _sites(model: nn.Module) -> list[Site]:
    return [site for site in survey(model) if site.adaptable and not site.tied_to]


def _tried(probe: nn.Module, batch: Mapping[str, Any]) -> tuple[list[Site], list[_Pass]]:
    """Return the sites without a gradient, and the passes that show it. The weights are left as last drawn."""
    import torch

    sites = _sites(probe)
    passes = [_backward(probe, batch, sites)]
    while len(passes) < _DRAWS and (left := _unreached(sites, passes)):
        redraw_weights(probe, torch.Generator().manual_seed(len(passes)))
        passes.append(_backward(probe, batch, left))
    if left := _unreached(sites, passes):
        # What a class cannot do in training mode says nothing of what it does otherwise.
        with suppress(Exception), in_training_mode(probe):
            passes.append(_backward(probe, batch, left))
    return _unreached(sites, passes), passes


def _unreached(sites: Sequence[Site], passes: Sequence[_Pass]) -> list[Site]:
    return [site for site in sites if not any(one.reaches(site) for one in passes)]


def _backward(model: nn.Module, batch: Mapping[str, Any], sites: Sequence[Site]) -> _Pass:
    import torch

    called: set[str] = set()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.zero_grad()
    with ExitStack() as stack, torch.enable_grad(), seeding(model, 0):
        for site in sites:
            if site.kind != kinds.PARAMETER:
                module = stack.enter_context(_in_place_of(model, site.path))
                module.register_forward_hook(lambda *_, path=site.path: called.add(path))
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
    trained = {site.path for site in sites if any(_has_gradient(weight) for weight in _weights(model, site))}
    return _Pass(frozenset(called), frozenset(trained))


@contextmanager
def _in_place_of(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Put a copy with the same weights where a module is, as PEFT puts an adapter there, and yield it.

    What calls the module from elsewhere, such as a plain list beside it, does not call the copy, nor an adapter.
    """
    parent, _, name = path.rpartition(".")
    owner, module = model.get_submodule(parent), model.get_submodule(path)
    instead = object.__new__(type(module))
    instead.__dict__.update(module.__dict__)  # copy.copy() refuses modules whose weights are parametrized
    instead._forward_hooks = OrderedDict()
    setattr(owner, name, instead)
    try:
        yield instead
    finally:
        setattr(owner, name, module)


def _weights(model: nn.Module, site: Site) -> list[nn.Parameter]:
    """Return the parameter of a site, or those that a parametrization computes it from."""
    parent, _, name = site.path.rpartition(".")
    if site.kind == kinds.PARAMETER:
        return [model.get_submodule(parent).get_parameter(name)]
    named = model.get_submodule(site.path).named_parameters()
    return [parameter for name, parameter in named if not name.rpartition(".")[2].endswith("bias")]


def _has_gradient(weight: nn.Parameter) -> bool:
    return weight.grad is not None and bool(weight.grad.any())


# ---- why ----


def _cause(model: nn.Module, batch: Mapping[str, Any], site: Site, passes: Sequence[_Pass]) -> NoGradient:
    if site.kind != kinds.PARAMETER and not any(site.path in one.called for one in passes):
        trained = any(site.path in one.trained for one in passes)
        return NoGradient.READ_PAST if trained else NoGradient.NOT_CALLED
    return NoGradient.ONLY_CHOOSES if _matters(model, batch, site) else NoGradient.NOT_READ


def _matters(model: nn.Module, batch: Mapping[str, Any], site: Site) -> bool:
    """Check whether the loss changes with another draw of a site's weight, in either mode."""
    if _changes_the_loss(model, batch, site):
        return True
    with suppress(Exception), in_training_mode(model):
        return _changes_the_loss(model, batch, site)
    return False


def _changes_the_loss(model: nn.Module, batch: Mapping[str, Any], site: Site) -> bool:
    import torch

    before = _loss(model, batch)
    weights = _weights(model, site)
    saved = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(weight.std() * torch.randn(weight.shape, generator=generator).to(weight))
        try:
            after = _loss(model, batch)
        finally:
            for weight, value in zip(weights, saved, strict=True):
                weight.copy_(value)
    return not torch.equal(before, after)


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    import torch

    with torch.no_grad(), seeding(model, 0):
        return loss_of(model, batch)
