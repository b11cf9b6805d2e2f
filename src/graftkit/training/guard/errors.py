"""The errors with which the guard stops a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftkit.errors import TrainingError
from graftkit.findings import Report
from graftkit.text import some


def check_arguments(**given: tuple[Any, type]) -> None:
    """Check the arguments of a guard, each with the type that it must have where it is not None.

    Raises:
        TrainingError: ``guard-argument``.
    """
    for name, (value, kind) in given.items():
        if not (value is None or isinstance(value, kind)):
            raise TrainingError(
                f"a guard's {name} is a {kind.__name__}, not a {type(value).__name__}",
                where=f"Guard({name}={value!r:.80})",
                help="plan = gk.plan(model, …); gk.Guard(plan)" if kind.__name__ == "Plan" else None,
                code="guard-argument",
            )


def no_adapter(model: Any) -> TrainingError:
    return TrainingError(
        f"nothing to guard: {type(model).__name__} has no adapter",
        why="without one, every weight of the model is trained",
        help="pass peft_config=plan.peft_config to the trainer, or a model from gk.attach",
        code="no-adapter",
    )


def failed_preflight(report: Report) -> TrainingError | None:
    """Return the error for what the rules found before the first step, or None without an error among it."""
    errors = report.errors
    if not errors:
        return None
    return TrainingError(
        f"this run would go wrong: {'; '.join(f'{f.code} {f.title}' for f in errors)}",
        where=errors[0].where,
        why="; ".join(f.message for f in errors),
        help="; ".join(dict.fromkeys(f.help for f in errors if f.help)),
        code="guard",
    )


def not_finite(kind: str, names: tuple[str, ...], step: int, last_good: Path | None) -> TrainingError:
    return TrainingError(
        f"a {kind} is not finite",
        where=f"step {step}: {some(names, 1)}",
        why="further steps would spread it to every weight of the adapter",
        help=f"{_resume_hint(last_good)}; lower the learning rate, train in bf16, and look at that step's data",
        code="not-finite",
    )


def nothing_trains(measured: int, step: int) -> TrainingError:
    """Return the error for a run in which ``measured`` steps of the optimizer changed no tensor."""
    return TrainingError(
        "no weight of the adapter changes",
        where=f"step {step}",
        why=f"there are gradients, and {measured} measured steps of the optimizer changed nothing",
        help="build the optimizer after the adapter is attached; in 16 bit, a small learning rate is rounded away",
        code="nothing-trains",
    )


def wrong_checkpoint(report: Report, folder: Path, last_good: Path | None) -> TrainingError | None:
    """Return the error for a checkpoint that is not the adapter in memory, or None where it is."""
    errors = report.errors
    if not errors:
        return None
    return TrainingError(
        "the saved adapter is not the one in memory",
        where=str(folder),
        why="; ".join(f"{finding.code} {finding.message}" for finding in errors),
        help=f"{errors[0].help}; {_resume_hint(last_good)}",
        code="saved-adapter",
    )


def _resume_hint(last_good: Path | None) -> str:
    return "no checkpoint is known to be good" if last_good is None else f"the last good checkpoint is {last_good}"
