"""The demo from end to end: the crash, the cure and the proof, on real handwritten digits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import attach
from graftkit.checks.verify import contract, verify
from graftkit.demo.digits import DigitSplit, load_digit_split
from graftkit.demo.page import page_of
from graftkit.demo.processor import config_overrides, digit_processor
from graftkit.demo.proof import Proof, fresh_process_reload, merged_checkpoint, merged_in_memory
from graftkit.demo.results import DemoResult, Run
from graftkit.demo.training import accuracy, predict, train
from graftkit.errors import GraftError, MissingDependencyError
from graftkit.files import folder_when_whole, write_text
from graftkit.findings import Report, Severity
from graftkit.planning.plan import plan
from graftkit.report.html import write_report
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.survey import survey
from graftkit.text import percent, table
from graftkit.twins.twin import twin

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, ProcessorMixin

MODEL = "google/gemma-4-E2B-it"
USUAL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RUNS = {"language": ("language",), "language_vision": ("language", "vision")}

_RANK, _ALPHA = 16, 32
_SHOWN = 12
_RESULT_FILE = "demo.json"


def run_demo(out: Path, *, tell: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Run the demo and publish its folder: ``report.html``, ``adapter/``, ``base/``, ``merged/``, ``demo.json``.

    Args:
        out: the folder to write; it appears when everything in it is whole.
        tell: called with each step's result, as text, while the demo goes on.

    Raises:
        OutputError: the folder cannot be written, or holds somebody else's files.
        MissingDependencyError: a package of the ``train`` extra is missing.
    """
    _check_dependencies()
    started = time.monotonic()
    with folder_when_whole(out, ours=_RESULT_FILE) as folder, _one_thread():
        return _Demo(Path(out), folder, tell, started).run()


@dataclass(frozen=True)
class _Demo:
    """One run of the demo: ``out`` is where its files will be found, ``folder`` where they are written."""

    out: Path
    folder: Path
    tell: Callable[[str], None]
    started: float

    def run(self) -> DemoResult:
        import json

        processor = digit_processor()
        base = twin(MODEL, overrides=config_overrides())
        digits = load_digit_split()
        refusal = stock_refusal(base)
        self.tell(f"1. Stock PEFT on a twin of {MODEL} with the usual seven names:\n   {refusal}")
        model_map = survey(base)
        self.tell(f"2. What can be adapted:\n\n{adaptable_per_tower(model_map)}")
        runs = {name: self._train(name, base, processor, digits) for name in RUNS}
        chosen = runs["language_vision"]
        self.tell(f"4. Held-out digits read right:\n\n{_accuracies(runs)}")
        proofs = self._prove(base, chosen, processor, digits)
        checks = _checks(chosen.report, proofs)
        self.tell(f"5. Proof:\n\n{_verdicts(checks)}")
        result = DemoResult(
            stock_peft_error=refusal,
            held_out_accuracy={name: run.accuracy for name, run in runs.items()},
            checks=checks,
            report=str(self.out / "report.html"),
            adapter=str(self.out / "adapter"),
            merged=str(self.out / "merged"),
            seconds=time.monotonic() - self.started,
        )
        write_report(
            self.folder / "report.html", page_of(result, model_map, runs, _shown(runs, processor, digits))
        )
        write_text(self.folder / _RESULT_FILE, json.dumps(result.to_dict(), indent=2) + "\n")
        self.tell(f"6. The report: {result.report}")
        return result

    def _train(self, name: str, base: PreTrainedModel, processor: ProcessorMixin, digits: DigitSplit) -> Run:
        model = copy.deepcopy(base)
        planned = plan(model, scope=RUNS[name], r=_RANK, alpha=_ALPHA)
        self.tell(f"3. The plan for {' + '.join(RUNS[name])}:\n\n{planned}")
        adapted = attach(model, planned)
        report = verify(adapted, settings=contract())
        trained = train(adapted, processor, digits.train, description=f"training {' + '.join(RUNS[name])}")
        return Run(planned, report, trained, accuracy(trained.model, processor, digits.held_out))

    def _prove(
        self, base: PreTrainedModel, run: Run, processor: ProcessorMixin, digits: DigitSplit
    ) -> dict[str, Proof]:
        model: PeftModel = run.trained.model
        base.save_pretrained(self.folder / "base")
        model.save_pretrained(self.folder / "adapter")
        batch = proof_batch(processor, digits)
        return {
            "fresh_process_reload": fresh_process_reload(model, self.folder, batch),
            "merged_in_memory": merged_in_memory(model, batch),
            "merged_checkpoint": merged_checkpoint(model, self.folder / "merged", batch),
        }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and lose 30-fold where another process is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stock_refusal(base: PreTrainedModel) -> str:
    """The first line of what stock PEFT says to the usual seven names on this model.

    Raises:
        GraftError: ``demo-no-refusal``: stock PEFT took them, so there is nothing to show any more.
    """
    from peft import LoraConfig, get_peft_model

    try:
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=list(USUAL_SEVEN)))
    except ValueError as error:
        return " ".join(str(error).split()).partition(" Currently,")[0]
    raise GraftError(
        "stock PEFT accepts the usual seven names on this model",
        why="the installed PEFT or transformers has learnt to look into wrappers",
        help="graft env shows the versions",
        code="demo-no-refusal",
    )


def adaptable_per_tower(model_map: ModelMap) -> str:
    """A table: per tower its sites, how many can be adapted, and how many of those are wrapped."""
    rows = []
    for tower in model_map.towers:
        sites = [site for site in model_map if site.tower == tower.name]
        able = [site for site in sites if site.adaptable]
        wrapped = sum(site.wrapper is not None for site in able)
        rows.append((tower.name, len(sites), len(able), wrapped, f"{tower.params:,}"))
    return table(("tower", ">sites", ">adaptable", ">of these wrapped", ">parameters"), rows)


def proof_batch(processor: ProcessorMixin, digits: DigitSplit) -> dict[str, Any]:
    """Sixteen held-out digits as model inputs."""
    rows = digits.held_out[:16]
    batch = processor(
        text=list(rows["prompt"]),
        images=list(rows["images"]),
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )
    return dict(batch)


def _check_dependencies() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("trl", "datasets", "sklearn", "PIL") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"the demo needs {', '.join(missing)}", help='pip install "graftkit[train]"')


def _checks(report: Report, proofs: dict[str, Proof]) -> dict[str, dict[str, Any]]:
    words = {Severity.OK: "ok", Severity.UNKNOWN: "unknown"}
    checks: dict[str, dict[str, Any]] = {
        finding.code: {
            "title": finding.title,
            "verdict": words.get(finding.severity, "failed"),
            "message": finding.message,
            **dict(finding.evidence),
        }
        for finding in report
    }
    return {**checks, **{name: proof.to_dict() for name, proof in proofs.items()}}


def _accuracies(runs: dict[str, Run]) -> str:
    rows = [
        (
            " + ".join(RUNS[name]),
            percent(run.accuracy),
            f"{run.trained.losses[-1][1]:.2f}",
            f"{run.trained.seconds:.0f} s",
        )
        for name, run in runs.items()
    ]
    return table(("adapted", ">read right", ">last loss", ">training"), rows)


def _verdicts(checks: dict[str, dict[str, Any]]) -> str:
    return table(("check", "verdict", "seen"), [(c["title"], c["verdict"], c["message"]) for c in checks.values()])


def _shown(
    runs: dict[str, Run], processor: ProcessorMixin, digits: DigitSplit
) -> Iterator[tuple[Any, str, dict[str, str]]]:
    """Some held-out digits: picture, right answer, and each run's answer."""
    rows = digits.held_out.select(range(_SHOWN))
    answers = {name: predict(run.trained.model, processor, rows) for name, run in runs.items()}
    for at, row in enumerate(rows):
        yield row["images"][0], row["completion"], {name: given[at] for name, given in answers.items()}
