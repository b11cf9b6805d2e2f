"""Serve adapters in an engine, and compare each with what PEFT computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.adapters.file import CONFIG_NAME, DEFAULT_RANK
from graftkit.engines.outcome import Outcome, Served
from graftkit.errors import EngineError
from graftkit.progress import Progress
from graftkit.serving.engine_process import TIME_LIMIT, Answer, EngineRun, Job, serve
from graftkit.serving.outcomes import Measured, refused, served

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of larger vocabularies, the tokens that are likeliest with or without the adapter are compared.
_WHOLE_VOCABULARY = 4096
_LIKELIEST = 256


@dataclass(frozen=True)
class Case:
    """One adapter that is served.

    Attributes:
        folder: as the engine takes it.
        expected: what PEFT computes with it: float32 log-probabilities, (prefixes, vocabulary).
        request: further arguments of its loading.
    """

    folder: Path
    expected: NDArray[Any] = field(compare=False, repr=False)
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Where adapters are served.

    Attributes:
        engine: "vllm", "llama.cpp" or "mlx".
        python: the Python that it is installed in.
        base: the base as the engine takes it.
        prefixes: token ids.
        expected: what transformers computes on the base: float32 log-probabilities, (prefixes, vocabulary).
        options: further arguments of the engine.
        time_limit: seconds for one process.
    """

    engine: str
    python: Path
    base: Path
    prefixes: Sequence[Sequence[int]]
    expected: NDArray[Any] = field(compare=False, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    time_limit: float = TIME_LIMIT

    def serve(
        self, cases: Mapping[str, Case], *, on_progress: Callable[[Progress], None] | None = None
    ) -> dict[str, Served]:
        """Serve the base and every adapter, in one process where none of them ends it.

        Raises:
            EngineError: ``engine-refuses-base``: no adapter can be judged; see ``engine_process.serve``
                for the others.
        """
        job = Job(
            base=self.base,
            adapters={name: case.folder for name, case in cases.items()},
            prefixes=self.prefixes,
            max_rank=max((rank_of(case.folder) for case in cases.values()), default=1),
            options=self.options,
            requests={name: case.request for name, case in cases.items() if case.request},
        )
        run = serve(self.engine, self.python, job, time_limit=self.time_limit, on_progress=on_progress)
        base = run.base.values
        if base is None:
            raise _base_refused(run)
        return {name: self._compared(case, run, base, run.adapters[name]) for name, case in cases.items()}

    def _compared(self, case: Case, run: EngineRun, base: NDArray[Any], answer: Answer) -> Served:
        if answer.values is None:
            return refused(run.engine, answer.refusal or "", replaced=run.replaced)
        return compared(self.expected, case.expected, base, answer.values, run.engine, replaced=run.replaced)


def _base_refused(run: EngineRun) -> EngineError:
    return EngineError(
        f"{run.engine} refuses the base",
        why=run.base.refusal,
        help="no adapter on it can be judged: serve it with another engine, or another version",
        code="engine-refuses-base",
    )


def compared(
    base: NDArray[Any],
    adapted: NDArray[Any],
    served_base: NDArray[Any],
    served_adapted: NDArray[Any],
    engine: str,
    *,
    replaced: tuple[str, ...] = (),
) -> Served:
    """Compare log-probabilities of shape (prefixes, vocabulary); an engine's vocabulary may be padded.

    Returns:
        What the engine did; unknown where nothing in them can be compared.
    """
    import numpy as np

    size = min(values.shape[1] for values in (base, adapted, served_base, served_adapted))
    columns = [values[:, :size] for values in (base, adapted, served_base, served_adapted)]
    if size > _WHOLE_VOCABULARY:
        likeliest = np.argpartition(-np.maximum(columns[0], columns[1]), _LIKELIEST, axis=1)[:, :_LIKELIEST]
        columns = [np.take_along_axis(values, likeliest, axis=1) for values in columns]
    try:
        return served(Measured(*(values.ravel().tolist() for values in columns)), engine, replaced=replaced)
    except ValueError as error:
        return Served(outcome=Outcome.UNKNOWN, engine=engine, says=str(error), replaced=replaced)


def rank_of(adapter: Path) -> int:
    """Return the largest rank in an adapter's configuration; PEFT's default where it says none."""
    import json

    file = adapter / CONFIG_NAME
    if not file.is_file():
        return DEFAULT_RANK
    config = json.loads(file.read_text(encoding="utf-8"))
    ranks = [config.get("r"), *dict(config.get("rank_pattern") or {}).values()]
    return max((rank for rank in ranks if isinstance(rank, int)), default=DEFAULT_RANK)
