"""A plan as a table that a person reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftkit.planning.config.methods import method_named, numbers_text
from graftkit.text import count, percent, size, table

if TYPE_CHECKING:
    from graftkit.planning.coverage import CoverageRow
    from graftkit.planning.plan import Plan


def plan_text(plan: Plan) -> str:
    """What is adapted, what is not and why, what it costs, and the targets PEFT gets."""
    numbers = numbers_text(method_named(plan.method), plan.peft_config)
    method = f"{plan.method} {numbers}".strip()
    head = f"{plan.model.model.name}: {method} on {', '.join(plan.targets)} in {', '.join(plan.scope)}"
    rows = [*_rows_in_scope(plan), *_rows_outside(plan)]
    columns = ("tower", "role", ">sites", ">adapted", ">of weights", "left alone because")
    total = (
        f"{len(plan.attached)} of {len(plan.model)} sites; {count(plan.trainable_params)} trainable parameters "
        f"({percent(plan.trainable_params / max(plan.model.model.params, 1))} of the model); "
        f"about {size(plan.memory.total)} before activations"
    )
    parts = [head, table(columns, rows), f"{total}\n{_layers(plan)}", _targets(plan)]
    return "\n\n".join([*parts, str(plan.quantization)] if plan.quantization else parts)


def _layers(plan: Plan) -> str:
    rows = [row for row in plan.layers if row.tower in plan.scope]
    told = [f"{row.reached} of {row.layers} {row.tower} layers" for row in rows]
    return f"reaches {', '.join(told)}" if told else ""


def _rows_in_scope(plan: Plan) -> Iterator[tuple[str, ...]]:
    for row in plan.coverage:
        if row.tower in plan.scope:
            yield _row(row)


def _rows_outside(plan: Plan) -> Iterator[tuple[str, ...]]:
    """One line for each tower out of scope: its roles all have the same reason."""
    for tower in plan.model.towers:
        if tower.name not in plan.scope:
            yield (tower.name, "all", str(tower.sites), "0", percent(0), "outside the scope")


def _row(row: CoverageRow) -> tuple[str, ...]:
    because = "; ".join(f"{reason} ({n})" if n < row.sites else reason for reason, n in row.reasons)
    return (row.tower, row.role, str(row.sites), str(row.adapted), percent(row.share), because)


def _targets(plan: Plan) -> str:
    config = plan.peft_config
    lines = []
    for name in ("target_modules", "target_parameters"):
        value = getattr(config, name, None)
        if value:
            lines.append(f"{name} = {value if isinstance(value, str) else sorted(value)}")
    if plan.unmatched:
        lines.append(f"unmatched: {', '.join(plan.unmatched)}")
    return "\n".join(lines)
