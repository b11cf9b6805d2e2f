"""The HTML report of a run: what was adapted, its curves, its findings, and how to load the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftkit.env import environment
from graftkit.findings import Finding
from graftkit.report.chart import Curve
from graftkit.report.data import Chart, ReportData, SavedFile
from graftkit.report.findings_page import checks_of
from graftkit.report.histogram import Histogram
from graftkit.report.html import write_report
from graftkit.report.model_pages import towers_of
from graftkit.surveying.sites import ModelMap
from graftkit.text import count
from graftkit.training.result import TrainingResult

# Title, unit, and the logged names that a section shows; * at the end of a name matches any rest.
_SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "loss", ("loss", "eval_loss")),
    ("Preference margin", "margin", ("rewards/margins", "eval_rewards/margins")),
    ("Preference accuracy", "share", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("Reward", "reward", ("reward", "rewards/*")),
    ("Token accuracy", "share", ("mean_token_accuracy", "eval_mean_token_accuracy")),
)


def write_page(result: TrainingResult, model_map: ModelMap, curves: Mapping[str, Sequence[Curve]]) -> Path:
    """Write the report into the run's folder.

    Args:
        model_map: of the base.
        curves: section title -> the guard's curves, one for each tower.
    """
    charts = [*_logged(result), *(Chart(title=title, unit="", curves=given) for title, given in curves.items())]
    data = ReportData(
        title=f"{result.trainer.upper()} on {model_map.model.name}",
        subtitle=f"{result.steps} steps in {result.seconds:.0f} s"
        + (", interrupted" if result.interrupted else ""),
        charts=[chart for chart in charts if chart["curves"]],
        histograms=_lengths(result.findings),
        checks=checks_of(result.findings),
        files=_files(result.folder),
        versions=environment()["packages"],
    )
    if result.plan is not None:
        data["figures_title"] = "What was trained"
        data["figures"] = [
            {"label": "weights adapted", "value": str(len(result.plan.attached))},
            {"label": "trained parameters", "value": count(result.plan.trainable_params)},
        ]
        data["towers"] = towers_of(model_map, result.plan)
    return write_report(result.report, data)


def _logged(result: TrainingResult) -> Iterable[Chart]:
    for title, unit, names in _SECTIONS:
        found = [name for pattern in names for name in _matching(pattern, result.history)]
        curves = [Curve(label=name, points=result.curve(name)) for name in dict.fromkeys(found)]
        yield Chart(title=title, unit=unit, curves=[curve for curve in curves if curve["points"]])


def _lengths(findings: Iterable[Finding]) -> list[Histogram]:
    """Return the lengths of the rows as GK214 found them before the first step; none where it could not."""
    found = next((f.evidence for f in findings if f.code == "GK214" and "lengths" in f.evidence), None)
    if found is None:
        return []
    limit, longest = found["max_length"], found["longest"]
    sample = "" if found["rows"] == found["rows_in_data"] else ", a sample"
    end = "nothing is cut" if limit is None else f"max_length is {limit:,}, {found['cut']:,} rows are cut"
    return [
        Histogram(
            title="Length of the rows",
            unit="tokens",
            width=found["lengths"]["width"],
            counts=found["lengths"]["counts"],
            limit=limit,
            limit_label=f"max_length {limit}",
            note=f"{found['rows']:,} rows{sample}; the longest has {longest:,} tokens; {end}.",
        )
    ]


def _matching(pattern: str, history: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    if not pattern.endswith("*"):
        return (pattern,)
    taken = {name for _, _, names in _SECTIONS for name in names}
    names = {name for entry in history for name in entry if name.startswith(pattern[:-1]) and name not in taken}
    return sorted(name for name in names if name.endswith("/mean"))


def _files(folder: Path) -> list[SavedFile]:
    load = f"PeftModel.from_pretrained(base, {str(folder)!r})"
    notes = {
        "adapter_model.safetensors": f"the adapter's weights: {load}",
        "adapter_config.json": "the adapter's configuration, stock PEFT",
        "tokenizer.json": "the tokenizer it was trained with",
    }
    present = [(folder / name, note) for name, note in notes.items() if (folder / name).is_file()]
    return [{"path": str(path), "size": path.stat().st_size, "note": note} for path, note in present]
