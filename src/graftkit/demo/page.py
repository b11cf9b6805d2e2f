"""The demo's results as the data of its report page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftkit.demo.results import DemoResult, TrainedAdapter
from graftkit.env import environment
from graftkit.report.data import ReportData, Sample
from graftkit.report.findings_page import checks_of
from graftkit.report.model_pages import towers_of
from graftkit.surveying.sites import ModelMap
from graftkit.text import percent

_CHANCE = 0.1  # ten digits, about equally frequent


def page_of(
    result: DemoResult, model_map: ModelMap, adapters: Sequence[TrainedAdapter], samples: Sequence[Sample]
) -> ReportData:
    """Return the page: figures, stock PEFT's refusal, the model as a picture, losses, samples and checks."""
    folder = Path(result.report).parent
    return ReportData(
        title="graftkit demo: handwritten digits on a Gemma 4 twin",
        subtitle="A tiny random model with Gemma 4 E2B's architecture, adapted twice with LoRA",
        summary=[
            "Stock PEFT refuses this model because its vision and audio linears sit inside wrappers that clamp "
            "what goes in and out. graftkit's plan is a stock PEFT configuration that targets the linear inside "
            "each wrapper, so the clamp stays around the adapter.",
            "Both runs train from a recipe, as graft train does, on the same 1,437 real digits. The model's own "
            "weights are random and frozen: what it reads, the adapter has learnt.",
        ],
        figures_title="Held-out digits read right",
        figures=[
            {
                "label": adapter.label,
                "value": percent(adapter.accuracy),
                "share": adapter.accuracy,
                "baseline": _CHANCE,
                "note": f"{len(adapter.plan.attached)} adapted weights, "
                f"{adapter.plan.trainable_params:,} trained parameters",
            }
            for adapter in adapters
        ],
        figures_note="360 digits that neither run trained on; the mark is chance.",
        quote={
            "title": "Stock PEFT's error",
            "command": 'get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj", …]))',
            "text": result.stock_peft_error,
            "explanation": "PEFT adapts linears, convolutions and embeddings; this is another module around one.",
        },
        towers=towers_of(model_map, adapters[-1].plan),
        towers_note="One cell a weight, for the run that adapts language and vision.",
        charts=[
            {
                "title": "Training loss",
                "unit": "loss",
                "curves": [{"label": a.label, "points": a.training.curve("loss")} for a in adapters],
                "note": "Loss on the answer token, in nats; guessing is 2.30.",
            }
        ],
        samples=samples,
        samples_note="The first held-out digits, not chosen.",
        checks=checks_of(result.checks),
        files=[
            {"path": result.adapter, "note": "the adapter and its run's own report: loads in stock PEFT"},
            {"path": result.merged, "note": "the merged model: loads in stock transformers"},
            {"path": str(folder / "base"), "note": "the twin it was trained on"},
        ],
        versions=environment()["packages"],
        command="graft demo",
    )
