"""Layers that are too narrow for the rank that an initializer would give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.decisions import Attached, LeftAlone, Skipped
from graftkit.planning.initializers import initializer_of
from graftkit.planning.matching import value_at

if TYPE_CHECKING:
    from peft import PeftConfig


def too_narrow(config: PeftConfig, attached: Sequence[Attached]) -> tuple[Skipped, ...]:
    """Return the sites whose weights have fewer directions than the initializer takes.

    A decomposition gives PEFT factors of a lower rank there than the configuration says: they do not load again,
    or it refuses the whole adapter.

    Args:
        config: a plan's configuration.

    Raises:
        PlanError: ``initializer-rank``: nothing would be left of what one of the targets names.
    """
    given: Any = config
    initializer = initializer_of(getattr(config, "init_lora_weights", None))
    if initializer is None or not initializer.directions:
        return ()
    left = []
    for one in attached:
        most = initializer.most_ranks(*one.site.shape[:2])
        rank = value_at(given.rank_pattern, one.target_path, given.r)
        if rank > most:
            left.append(
                LeftAlone.TOO_NARROW.skip(one.site, initializer=given.init_lora_weights, most=most, rank=rank)
            )
    narrow = {skipped.path: skipped for skipped in left}
    for target in dict.fromkeys(one.target for one in attached):
        named = [one.path for one in attached if one.target == target]
        if all(path in narrow for path in named):
            raise PlanError(
                f"{given.init_lora_weights} cannot give what {target!r} names that rank",
                where=named[0],
                why=narrow[named[0]].reason,
                help="a lower rank, a lower one for these layers (rank_pattern), or no initializer",
                code="initializer-rank",
            )
    return tuple(left)
