"""The demo's results as the data of its report page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.demo.digits import to_grey
from graftkit.env import environment
from graftkit.report.data import ReportData
from graftkit.report.model_pages import towers_of
from graftkit.text import percent

if TYPE_CHECKING:
    from graftkit.demo.results import DemoResult, Run
    from graftkit.planning.plan import Plan
    from graftkit.surveying.sites import ModelMap

_CHANCE = 0.1  # ten digits, about equally frequent
_LABELS = {"language": "language only", "language_vision": "language + vision"}


def page_of(
    result: DemoResult,
    model_map: ModelMap,
    runs: Mapping[str, Run],
    shown: Iterable[tuple[Any, str, Mapping[str, str]]],
) -> ReportData:
    """The page: figures, stock PEFT's refusal, the model as a picture, losses, samples, checks and files."""
    return ReportData(
        title="graftkit demo: handwritten digits on a Gemma 4 twin",
        subtitle="A tiny random model with Gemma 4 E2B's architecture, adapted twice with LoRA",
        summary=[
            "Stock PEFT refuses this model because its vision and audio linears sit inside wrappers that clamp "
            "what goes in and out. graftkit's plan is a stock PEFT configuration that targets the linear inside "
            "each wrapper, so the clamp stays around the adapter.",
            "Both runs train with TRL on the same 1,437 real digits. The model's own weights are random and "
            "frozen: what it reads, the adapter has learnt.",
        ],
        figures_title="Held-out digits read right",
        figures=[
            {
                "label": _LABELS[name],
                "value": percent(share),
                "share": share,
                "baseline": _CHANCE,
                "note": _size(runs[name].plan),
            }
            for name, share in result.held_out_accuracy.items()
        ],
        figures_note="360 digits that neither run trained on; the mark is chance.",
        quote={
            "title": "What stock PEFT says",
            "command": 'get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj", …]))',
            "text": result.stock_peft_error,
            "explanation": "PEFT adapts linears, convolutions and embeddings; this is another module around one.",
        },
        towers=towers_of(model_map, runs["language_vision"].plan),
        towers_note="One cell a weight, for the run that adapts language and vision.",
        charts=[
            {
                "title": "Training loss",
                "unit": "loss",
                "curves": [{"label": _LABELS[name], "points": run.trained.losses} for name, run in runs.items()],
                "note": "Loss on the answer token, in nats; guessing is 2.30.",
            }
        ],
        samples=[
            {
                "pixels": to_grey(image),
                "expected": expected,
                "answers": [{"run": _LABELS[name], "text": text} for name, text in answers.items()],
            }
            for image, expected, answers in shown
        ],
        samples_note="The first held-out digits, not chosen.",
        checks=[
            {
                "code": name,
                "title": check["title"],
                "verdict": check["verdict"],
                "evidence": check["message"],
            }
            for name, check in result.checks.items()
        ],
        files=[
            {"path": result.adapter, "note": "the adapter: loads in stock PEFT"},
            {"path": result.merged, "note": "the merged model: loads in stock transformers"},
            {"path": str(Path(result.adapter).parent / "base"), "note": "the twin it was trained on"},
        ],
        versions={name: version for name, version in environment()["packages"].items() if version},
        command="graft demo",
    )


def _size(plan: Plan) -> str:
    return f"{len(plan.attached)} adapted weights, {plan.trainable_params:,} trained parameters"
