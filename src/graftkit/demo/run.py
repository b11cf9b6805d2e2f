"""The demo from end to end: the crash, the cure and the proof, on real handwritten digits."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.attaching.attach import attach
from graftkit.checks.verify import contract, verify
from graftkit.demo.digits import DigitSplit, load_digit_split, to_grey
from graftkit.demo.evaluation import accuracy, model_inputs, predict
from graftkit.demo.page import page_of
from graftkit.demo.processor import config_overrides, digit_processor, known_to_transformers
from graftkit.demo.proof import prove
from graftkit.demo.results import DemoResult, TrainedAdapter
from graftkit.demo.training import train_adapter, write_recipe
from graftkit.errors import GraftError, MissingDependencyError
from graftkit.files import atomic_folder, write_text
from graftkit.findings import Report
from graftkit.modeling.threads import one_thread
from graftkit.report.data import Sample
from graftkit.report.html import write_report
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.survey import survey
from graftkit.text import percent, table
from graftkit.twins.twin import twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

MODEL = "google/gemma-4-E2B-it"
USUAL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_BASE, _ADAPTER, _MERGED = Path("base"), Path("adapter"), Path("merged")
_TRAIN = Path("train")  # beside the recipes
_PROOF_ROWS = 16
_SHOWN_ROWS = 12
_REPORT_FILE, _RESULT_FILE = "report.html", "demo.json"


def run_demo(out: Path, *, show: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Run the demo and publish its folder.

    Its files: ``report.html``, ``demo.json``, ``base/``, ``adapter/`` (language and vision), ``adapter_language/``
    and ``merged/``. While the demo runs, the folder is the working directory: its files then name each other by
    relative paths, which still hold after it is published or moved.

    Args:
        out: the folder to write; it appears once it is complete.
        show: called with each step's result as text.

    Raises:
        OutputError: the folder cannot be written, or contains other files.
        MissingDependencyError: a package of the ``train`` extra is missing.
    """
    _check_dependencies()
    started = time.monotonic()
    with (
        atomic_folder(out, marker=_RESULT_FILE) as folder,
        tempfile.TemporaryDirectory(prefix="graftkit-demo-") as scratch,
        chdir(folder),
        one_thread(),
    ):
        demo = _Demo(Path(scratch), show, twin(MODEL, overrides=config_overrides()), digit_processor())
        return demo.run(Path(out), started)


@dataclass(frozen=True)
class _Demo:
    """One run of the demo, in the folder that it fills.

    Attributes:
        scratch: a folder for recipes and training data.
        show: called with each step's result.
    """

    scratch: Path
    show: Callable[[str], None]
    base: PreTrainedModel
    processor: ProcessorMixin
    digits: DigitSplit = field(default_factory=load_digit_split)

    def run(self, out: Path, started: float) -> DemoResult:
        refusal = stock_refusal(self.base)
        self.show(f"1. Stock PEFT on a twin of {MODEL} with the usual seven names:\n   {refusal}")
        model_map = survey(self.base)
        self.show(f"2. What can be adapted:\n\n{adaptable_per_tower(model_map)}")
        self.base.save_pretrained(_BASE)
        self.processor.save_pretrained(_BASE)
        self.digits.train.save_to_disk(self.scratch / _TRAIN)
        adapters = (
            self.train(model_map, ("language",), Path("adapter_language")),
            self.train(model_map, ("language", "vision"), _ADAPTER),
        )
        self.show(f"4. Held-out digits read right:\n\n{_accuracies(adapters)}")
        checks = self.check(adapters[-1])
        self.show(f"5. Proof:\n\n{_verdicts(checks)}")
        result = DemoResult(
            stock_peft_error=refusal,
            held_out_accuracy={adapter.name: adapter.accuracy for adapter in adapters},
            checks=checks,
            report=str(out / _REPORT_FILE),
            adapter=str(out / _ADAPTER),
            merged=str(out / _MERGED),
            seconds=time.monotonic() - started,
        )
        write_report(Path(_REPORT_FILE), page_of(result, model_map, adapters, list(self.samples(adapters))))
        write_text(_RESULT_FILE, json.dumps(result.to_dict(), indent=2) + "\n")
        self.show(f"6. The report: {result.report}")
        return result

    def train(self, model_map: ModelMap, scope: Sequence[str], output: Path) -> TrainedAdapter:
        file = self.scratch / f"{output}.yaml"
        recipe = write_recipe(file, base=_BASE, data=_TRAIN, output=output, scope=scope)
        plan = recipe.plan(model_map)
        self.show(f"3. Training {' + '.join(scope)} as planned:\n\n{plan}")
        with known_to_transformers(self.processor):
            training, model = train_adapter(recipe)
        return TrainedAdapter(plan, training, model, accuracy(model, self.processor, self.digits.held_out))

    def check(self, adapter: TrainedAdapter) -> Report:
        """Verify the contract on a fresh adapter, and compare the trained one with its files."""
        fresh = verify(attach(copy.deepcopy(self.base), adapter.plan), settings=contract())
        batch = model_inputs(self.processor, self.digits.held_out[:_PROOF_ROWS])
        return Report((*fresh, *prove(adapter.model, batch, _BASE, _ADAPTER, _MERGED)))

    def samples(self, adapters: Sequence[TrainedAdapter]) -> Iterator[Sample]:
        """Yield the first held-out digits: picture, right answer, and what each adapter reads."""
        rows = self.digits.held_out.select(range(_SHOWN_ROWS))
        answers = {adapter.label: predict(adapter.model, self.processor, rows) for adapter in adapters}
        for at, row in enumerate(rows):
            yield {
                "pixels": to_grey(row["images"][0]),
                "expected": row["completion"],
                "answers": [{"run": label, "text": read[at]} for label, read in answers.items()],
            }


def stock_refusal(base: PreTrainedModel) -> str:
    """Return the first line of stock PEFT's error for the usual seven names on this model.

    Raises:
        GraftError: ``demo-no-refusal``: stock PEFT accepts them, so there is nothing to show.
    """
    from peft import LoraConfig, get_peft_model

    try:
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=list(USUAL_SEVEN)))
    except ValueError as error:
        return " ".join(str(error).split()).partition(" Currently,")[0]
    raise GraftError(
        "stock PEFT accepts the usual seven names on this model",
        why="the installed PEFT or transformers looks into wrappers",
        help="graft env shows the versions",
        code="demo-no-refusal",
    )


def adaptable_per_tower(model_map: ModelMap) -> str:
    """Return a table: per tower its sites, how many can be adapted, and how many of those are wrapped."""
    rows = []
    for tower in model_map.towers:
        sites = [site for site in model_map if site.tower == tower.name]
        able = [site for site in sites if site.adaptable]
        wrapped = sum(site.wrapper is not None for site in able)
        rows.append((tower.name, len(sites), len(able), wrapped, f"{tower.params:,}"))
    return table(("tower", ">sites", ">adaptable", ">of these wrapped", ">parameters"), rows)


def _check_dependencies() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("trl", "datasets", "sklearn", "PIL") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"the demo needs {', '.join(missing)}", help='pip install "graftkit[train]"')


def _accuracies(adapters: Sequence[TrainedAdapter]) -> str:
    rows = [
        (
            adapter.label,
            percent(adapter.accuracy),
            f"{adapter.training.curve('loss')[-1][1]:.2f}",
            f"{adapter.training.seconds:.0f} s",
        )
        for adapter in adapters
    ]
    return table(("adapted", ">read right", ">last loss", ">training"), rows)


def _verdicts(checks: Report) -> str:
    return table(("check", "verdict", "seen"), [(f.title, str(f.severity), f.message) for f in checks])
