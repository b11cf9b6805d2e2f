"""A plan as a table for people, rendered from its JSON fields."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from graftkit.text import count, percent, size, some, table


def plan_text(plan: Mapping[str, Any], hyperparameters: str) -> str:
    """Render what ``Plan.to_dict()`` returns: what is adapted, what is not and why, the cost and the targets.

    Args:
        hyperparameters: the method's sizes, as in "r=16 lora_alpha=16".
    """
    model, scope = plan["model"], plan["scope"]
    method = f"{plan['method']} {hyperparameters}".strip()
    columns = ("tower", "role", ">sites", ">adapted", ">of weights", "left alone because")
    towers = {*scope, *(row["tower"] for row in plan["coverage"] if row["adapted"])}
    rows = [*map(_row, _within(plan["coverage"], towers)), *_rows_outside(plan["coverage"], towers)]
    sites = len(plan["attached"]) + len(plan["skipped"])
    total = (
        f"{len(plan['attached'])} of {sites} sites; {count(plan['trainable_params'])} trainable parameters "
        f"({percent(plan['trainable_params'] / max(model['params'], 1))} of the model); "
        f"about {size(plan['memory']['total'])} before activations"
    )
    layers = _within(plan["layers"], towers)
    reached = ", ".join(f"{row['reached']} of {row['layers']} {row['tower']} layers" for row in layers)
    return "\n\n".join(
        [
            f"{model['name']}: {method} on {', '.join(plan['targets'])} in {', '.join(scope)}",
            table(columns, rows),
            f"{total}\n{f'reaches {reached}' if reached else ''}",
            _targets(plan),
        ]
    )


def _within(rows: list[dict[str, Any]], towers: Collection[str]) -> list[dict[str, Any]]:
    return [row for row in rows if row["tower"] in towers]


def _row(row: Mapping[str, Any]) -> tuple[object, ...]:
    because = (f"{reason} ({n})" if n < row["sites"] else reason for reason, n in row["reasons"].items())
    return (row["tower"], row["role"], row["sites"], row["adapted"], percent(row["share"]), "; ".join(because))


def _rows_outside(coverage: list[dict[str, Any]], towers: Collection[str]) -> Iterator[tuple[object, ...]]:
    """Yield one line for each tower out of scope: its roles all have the same reason."""
    outside = [row for row in coverage if row["tower"] not in towers]
    for tower in dict.fromkeys(row["tower"] for row in outside):
        sites = sum(row["sites"] for row in outside if row["tower"] == tower)
        yield (tower, "all", sites, 0, percent(0), "outside the scope")


def _targets(plan: Mapping[str, Any]) -> str:
    fields = {name: plan["peft_config"].get(name) for name in ("target_modules", "target_parameters")}
    lines = [
        f"{name} = {value if isinstance(value, str) else sorted(value)}" for name, value in fields.items() if value
    ]
    lines += [f"warning: {some(warning['sites'])}: {warning['message']}" for warning in plan["warnings"]]
    if plan["reach"]["reason"]:
        lines.append(f"which weights get a gradient is not known: {plan['reach']['reason']}")
    lines += [f"passed over: {unmet['target']}: {unmet['reason']}" for unmet in plan["unmet"]]
    return "\n".join(lines)
