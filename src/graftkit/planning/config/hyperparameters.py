"""Rank, alpha and dropout: checked, and put under the names that a method has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.config.methods import Method

if TYPE_CHECKING:
    from peft import PeftConfig

# LoRA's usual rank today; every other method starts from the size that its own authors gave it in PEFT.
_LORA_RANK = 16


def check_values(r: Any, alpha: Any, dropout: Any) -> None:
    """Refuse a rank, alpha or dropout that PEFT would accept late, or silently. None is "not given".

    Raises:
        PlanError: ``rank-invalid``, ``alpha-invalid`` or ``dropout-invalid``.
    """
    if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r <= 0):
        raise PlanError(
            f"the rank must be a positive whole number, not {r!r}",
            where="r",
            why="a rank of 0 or less adapts nothing",
            help="r=16 is a usual choice",
            code="rank-invalid",
        )
    if alpha is not None and (not isinstance(alpha, int | float) or alpha <= 0):
        raise PlanError(
            f"alpha must be positive, not {alpha!r}",
            where="alpha",
            why="it is the numerator of the factor on the update",
            help="alpha=r scales by 1",
            code="alpha-invalid",
        )
    if dropout is not None and (not isinstance(dropout, int | float) or not 0 <= dropout < 1):
        raise PlanError(
            f"dropout must lie in [0, 1), not {dropout!r}",
            where="dropout",
            why="it is the share of the adapter's input that is dropped",
            help="dropout=0.0",
            code="dropout-invalid",
        )


def field_values(method: Method, r: int | None, alpha: float | None, dropout: float | None) -> dict[str, Any]:
    """Return the rank, alpha and dropout under the method's own names.

    What was not given keeps PEFT's default, but for LoRA's rank, which is 16. Alpha that was not given keeps
    PEFT's own ratio to the rank, so that a larger rank is not scaled down: 1 for LoRA, 2 for GraLoRA.

    Raises:
        PlanError: ``rank-unknown``, ``alpha-unknown`` or ``dropout-unknown``: given, and the method has none.
    """
    if method.config_class.__name__ == "LoraConfig" and r is None:
        r = _LORA_RANK
    chosen: dict[str, Any] = {}
    for argument, given, name in (
        ("r", r, method.rank_field),
        ("alpha", None if alpha is None else _whole(alpha), method.alpha_field),
        ("dropout", dropout or None, method.dropout_field),
    ):
        if given is None:
            continue
        if name is None:
            raise _has_no(method, argument)
        chosen[name] = given
    return {**chosen, **_following_rank(method, r, alpha)}


def _following_rank(method: Method, r: int | None, alpha: float | None) -> dict[str, Any]:
    """Return the fields that change with a given rank, by PEFT's own ratios."""
    rank, scale = method.rank_field, method.alpha_field
    usual = method.defaults.get(rank or "")
    if r is None or not usual:
        # OFT's rank and block size are two names of one choice: PEFT takes exactly one that is not 0.
        return {method.dividing_field: 0} if r is not None and method.dividing_field else {}
    follows = {}
    if alpha is None and scale is not None and method.defaults[scale]:
        follows[scale] = _whole(method.defaults[scale] * r / usual)
    if "init_r" in method.defaults:
        follows["init_r"] = max(1, round(method.defaults["init_r"] * r / usual))
    return follows


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def values_text(method: Method, config: PeftConfig) -> str:
    """Return what sets the size and scale of the adapters in ``config``, as in "r=16 lora_alpha=16"."""
    if method.rank_field and getattr(config, method.rank_field, None):
        shown: Sequence[str | None] = (method.rank_field, method.alpha_field)
    else:
        shown = [method.dividing_field] if method.dividing_field else method.sizes[:1]
    values = ((name, getattr(config, name, None)) for name in shown if name)
    return " ".join(f"{name}={value:g}" for name, value in values if isinstance(value, int | float))


def _has_no(method: Method, argument: str) -> PlanError:
    word = "rank" if argument == "r" else argument
    has = [n for n in method.defaults if n.endswith("dropout")] if word == "dropout" else method.sizes
    instead = ", ".join(f"{name}={method.defaults[name]}" for name in has)
    return PlanError(
        f"{method.name} has no {word}",
        where=method.config_class.__name__,
        why=f"it has {instead} instead" if instead else "its size does not depend on one",
        help=f"leave {argument} out" + (f", or pass {has[0]}=…" if has else ""),
        code=f"{word}-unknown",
    )
