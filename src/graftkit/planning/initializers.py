"""LoRA's initializers: one row for each, with what it does to the base weights and what it needs."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftkit.errors import PlanError
from graftkit.text import suggest


@dataclass(frozen=True, slots=True)
class Initializer:
    """A named value of ``init_lora_weights``.

    Attributes:
        name: in lower case; "pissa_niter" stands for every ``pissa_niter_[number of iters]``.
        only_draws: it draws the adapter's first values without reading the base weights or data.
        moves_base: it takes those values out of the base weights, so that B·A alone is not the update.
        needs_data: it runs batches through the model first (``graftkit.initialize``).
        rebuilt_on_load: whether stock PEFT makes the base it was trained on again when it loads the adapter onto
            the original one; None where that depends on the machine.
        any_kind: PEFT applies it to every kind of layer, bare parameters and quantized linears included.
        by_prefix: PEFT takes every value that begins with the name.
        directions: how many directions of a weight it takes for each rank: a layer whose smaller side has fewer
            cannot have that rank. 0: any layer can have any.
    """

    name: str
    only_draws: bool = False
    moves_base: bool = False
    needs_data: bool = False
    rebuilt_on_load: bool | None = True
    any_kind: bool = False
    by_prefix: bool = False
    directions: int = 0

    @property
    def needs_conversion(self) -> bool:
        """Whether its adapter is only of use on the original base once it is saved as plain LoRA."""
        return self.moves_base and self.rebuilt_on_load is False

    def most_ranks(self, outputs: int, inputs: int) -> int:
        """Return the highest rank that it can give a weight of that shape; only where it takes directions."""
        return min(outputs, inputs) // self.directions


# First match wins. Sources: peft.tuners.lora.layer.LoraLayer.update_layer and the methods it calls (pissa_init …).
INITIALIZERS = (
    Initializer("gaussian", only_draws=True, any_kind=True),
    Initializer("orthogonal", only_draws=True),
    Initializer("mica", directions=1),
    # Its randomized decomposition depends on the random generator.
    Initializer("pissa_niter", moves_base=True, rebuilt_on_load=False, by_prefix=True, directions=1),
    Initializer("pissa", moves_base=True, by_prefix=True, directions=1),
    Initializer("olora", moves_base=True, directions=1),
    # From the second iteration on, its rounding depends on the last bits of a decomposition, and it needs a GPU.
    Initializer("loftq", moves_base=True, rebuilt_on_load=None, directions=1),
    Initializer("eva", needs_data=True),
    # Loading it raises without the covariances of its preprocessing.
    Initializer("corda", moves_base=True, needs_data=True, rebuilt_on_load=False, by_prefix=True, directions=1),
    # Loading it leaves the base as it is, because the gradients are missing.
    # One half of the directions goes into A, the other into B.
    Initializer("lora_ga", moves_base=True, needs_data=True, rebuilt_on_load=False, directions=2),
)


def initializer_of(given: object) -> Initializer | None:
    """Return the row for a value of ``init_lora_weights``, in any letter case.

    None for True and False (PEFT's own starting values) and for names that are in no row.
    """
    if not isinstance(given, str):
        return None
    name = given.lower()
    return next(
        (row for row in INITIALIZERS if name == row.name or (row.by_prefix and name.startswith(row.name))), None
    )


def moves_base(given: object) -> bool:
    """Check whether a value of ``init_lora_weights`` makes PEFT change the base weights."""
    row = initializer_of(given)
    return row is not None and row.moves_base


def initializer_names() -> tuple[str, ...]:
    """Return the named initializers of the installed PEFT, from its configuration class."""
    types = _field_types()
    literals = [name for arm in types["init_lora_weights"] for name in typing.get_args(arm)]
    configured = [row.name for row in INITIALIZERS if f"{row.name}_config" in types]
    return tuple(dict.fromkeys([*literals, *configured]))


@functools.cache
def _field_types() -> dict[str, tuple[Any, ...]]:
    """Return the types that each field of ``LoraConfig`` takes, in the order in which PEFT lists them."""
    from peft import LoraConfig

    return {name: typing.get_args(hint) for name, hint in typing.get_type_hints(LoraConfig).items()}


def default_config(init: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that ``init`` needs, with PEFT's defaults, where ``options`` has none.

    Raises:
        PlanError: ``initializer-unknown``.
    """
    if not isinstance(init, str):
        return {}
    known = initializer_names()
    if (init not in known or "[" in init) and not re.fullmatch(r"pissa_niter_\d+", init):
        raise PlanError(
            f"unknown initializer {init!r}",
            where="init_lora_weights",
            why=f"PEFT has True, False, {', '.join(known)}",
            help=suggest(init.lower(), known) or "leave it out for LoRA's own",
            code="initializer-unknown",
        )
    field = f"{init}_config"
    types = _field_types().get(field)
    return {field: types[0]()} if types and not options.get(field) else {}
