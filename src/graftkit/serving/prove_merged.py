"""``prove_merged()``: serve a merged checkpoint in the real engine, and compare its outputs with PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.engines.outcome import Outcome, Served
from graftkit.errors import EngineError, SourceError
from graftkit.progress import Progress
from graftkit.serving.comparing import compared
from graftkit.serving.engine_process import TIME_LIMIT, Job, serve
from graftkit.serving.install import engine_python
from graftkit.serving.prove import Proof, load_in_float32, weights_folder, with_adapter
from graftkit.serving.reference import log_probabilities, text_prefixes
from graftkit.surveying.sources.quiet import quiet_transformers

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Without a base, the difference between prefixes is what there is to see: up to the first part of it an error is
# rounding, from the second on it is another model.
_SAME, _OTHER = 1e-3, 1e-1
# The part of the adapter's effect by which a merge in half precision may differ from it.
_MERGED = 0.1


def prove_merged(
    merged: str | Path,
    *,
    target: str,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    python: str | Path | None = None,
    engine_options: Mapping[str, Any] | None = None,
    time_limit: float = TIME_LIMIT,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Proof:
    """Serve a merged checkpoint in the real engine, and compare its log-probabilities with transformers'.

    Args:
        merged: the folder of the merged checkpoint.
        target: "vllm", "llama.cpp" or "mlx".
        base: the folder of what was merged into: the engine's own error is measured on it. Without it that is not
            known, and only a clear verdict is given.
        adapter: what was merged, for a base that is given: the checkpoint has to be what PEFT computes with it.
        python: the engine's Python or the folder of its environment; see ``install.engine_python``.
        engine_options: further arguments of the engine.
        time_limit: seconds for one process of the engine.
        seed: of the prefixes.
        on_progress: called before each step.

    Raises:
        SourceError, BuildError, AdapterError: a folder cannot be read.
        EngineError: the engine is unknown, not installed, refuses the checkpoint, or its process failed; see
            ``engine_process.serve``.
    """
    report = on_progress or (lambda _progress: None)
    engine_at = engine_python(target, python)
    folder = _folder(merged)
    with quiet_transformers():
        report(Progress("loading the merged checkpoint", 0, None))
        live = load_in_float32(folder)
        prefixes = text_prefixes(live.config, seed=seed)
        expected = log_probabilities(live, prefixes)

        def in_engine(checkpoint: Path) -> tuple[NDArray[Any], str]:
            job = Job(checkpoint, {}, prefixes, options=engine_options or {})
            run = serve(target, engine_at, job, time_limit=time_limit, on_progress=report)
            if run.base.values is None:
                raise _refused(checkpoint, run.engine, run.base.refusal)
            return run.base.values, run.engine

        answer, engine = in_engine(folder)
        if base is None:
            found = _alone(expected, answer, engine)
        else:
            report(Progress("loading the base", 0, None))
            plain = load_in_float32(_folder(base))
            unadapted = log_probabilities(plain, prefixes)
            served_base, _ = in_engine(_folder(base))
            found = compared(unadapted, expected, served_base, answer, engine)
            if adapter is not None:
                adapted = log_probabilities(with_adapter(plain, adapter), prefixes)
                found = _if_merge_of(found, unadapted, adapted, expected)
    return Proof(
        model=str(merged),
        on_twin=False,
        adapter=None if adapter is None else str(adapter),
        target=target,
        converted=False,
        served=found,
        base=None if base is None else str(base),
    )


def _if_merge_of(found: Served, unadapted: NDArray[Any], adapted: NDArray[Any], merged: NDArray[Any]) -> Served:
    """Check besides that the checkpoint is the merge: engines serve a wrong one as faithfully."""
    effect = float(abs(adapted - unadapted).max())
    off = float(abs(merged - adapted).max())
    if found.outcome is Outcome.APPLIED and off > _MERGED * effect:
        says = f"in transformers, too, the checkpoint is {off:.2g} off the adapter, whose effect is {effect:.2g}"
        return replace(found, outcome=Outcome.DIFFERENT, error=off, says=says)
    return found


def _alone(expected: NDArray[Any], answer: NDArray[Any], engine: str) -> Served:
    """Compare without a base: its noise is not known, and only what is far from it can be told."""
    size = min(expected.shape[1], answer.shape[1])
    here, there = expected[:, :size], answer[:, :size]
    error, spread = float(abs(here - there).max()), float((here.max(axis=0) - here.min(axis=0)).max())
    outcome = Outcome.UNKNOWN
    if error <= _SAME * spread:
        outcome = Outcome.APPLIED
    elif error >= _OTHER * spread:
        outcome = Outcome.DIFFERENT
    says = None
    if outcome is Outcome.UNKNOWN:
        says = (
            f"it is {error:.2g} off, where prefixes differ by {spread:.2g}: without the base its own noise there "
            "is not known"
        )
    return Served(outcome=outcome, engine=engine, effect=spread, error=error, compared=here.size, says=says)


def _folder(name: str | Path) -> Path:
    found = weights_folder(str(name))
    if found is None:
        raise SourceError(
            "there are no weights to serve",
            where=str(name),
            why="a checkpoint is proven by its own files",
            help="name the folder that graft merge wrote, or the base's folder",
            code="weights-not-local",
        )
    return found


def _refused(checkpoint: Path, engine: str, words: str | None) -> EngineError:
    return EngineError(
        f"{engine} refuses the checkpoint",
        where=str(checkpoint),
        why=words,
        help="serve it with another engine, or another version",
        code="engine-refuses-base",
    )
