"""Train an adapter on the demo's digits through TRL's ``SFTTrainer``, and measure what it learned."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftkit.errors import GraftError
from graftkit.modeling.device import on_device_of
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.unwrapping import base_model_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    import datasets
    import torch
    from peft import PeftConfig, PeftModel
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
    from trl import SFTConfig, SFTTrainer


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        batch_size: digits a step.
        learning_rate: the peak, reached after ``warmup_steps`` and decayed linearly to zero.
        warmup_steps: steps of linear warm-up.
        seed: seeds the order of the digits and, where ``train`` attaches the adapter, its weights.
        log_every: each reported loss is the mean over this many steps.
    """

    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 10
    seed: int = 0
    log_every: int = 5


@dataclass(frozen=True)
class TrainingRun:
    """What a training run did.

    Attributes:
        model: the model with the trained adapter, in eval mode.
        losses: pairs of the step, counted from 1, and the mean completion loss in nats over the steps
            since the previous pair.
        seconds: wall-clock time, building the trainer included.
        steps: optimizer steps taken.
        image_tokens: token positions that reached the model marked as picture (``mm_token_type_ids`` 1).
    """

    model: PeftModel
    losses: tuple[tuple[int, float], ...]
    seconds: float
    steps: int
    image_tokens: int


def train(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    dataset: datasets.Dataset,
    *,
    peft_config: PeftConfig | None = None,
    settings: TrainingSettings | None = None,
    description: str = "training",
    console: Console | None = None,
) -> TrainingRun:
    """Train an adapter on prompt/completion/images rows, with the loss on the completion alone.

    Runs on one core of the CPU in float32. Writes no file and nothing to stdout; a progress bar goes to
    stderr. Like any transformers trainer it seeds Python's, numpy's and torch's global generators.

    Args:
        model: a ``PeftModel`` whose adapter is to be trained, or a base model together with ``peft_config``.
        processor: makes the batches; its ``image_token_id`` must be the model's.
        dataset: rows as made by :func:`graftkit.demo.digits.load_digit_split`.
        peft_config: the adapter to attach to a base model; None where ``model`` has one already.
        settings: steps, batch size, learning rate and seed.
        description: names the run in its progress bar.
        console: where the progress bar goes; stderr by default.

    Raises:
        GraftError: ``demo-image-tokens``: a batch with pictures reached the model without their token types.
        GraftError: ``demo-diverged``: the loss is no longer a number.
        ValueError: neither an attached adapter nor a ``peft_config``, or both.
    """
    chosen = settings or TrainingSettings()
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_thread())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graftkit-demo-"))
        stack.enter_context(_keeping_forward(base_model_of(model)))
        trainer = _trainer(model, processor, dataset, peft_config, chosen, folder)
        progress = stack.enter_context(_progress_bar(description, chosen, console))
        watch = stack.enter_context(_watching(base_model_of(trainer.model), processor))
        trainer.add_callback(progress)
        trainer.train()
    trained: PeftModel = trainer.model.eval()
    return TrainingRun(
        model=trained,
        losses=_losses(trainer.state.log_history),
        seconds=time.perf_counter() - started,
        steps=trainer.state.global_step,
        image_tokens=watch.image_tokens,
    )


def predict(
    model: nn.Module, processor: ProcessorMixin, dataset: datasets.Dataset, *, batch_size: int = 128
) -> tuple[str, ...]:
    """The token the model finds likeliest after each prompt, out of the whole vocabulary.

    Leaves the model in the mode (train or eval) it was in.

    Args:
        model: any model that takes the processor's batches and returns ``logits`` (batch, length, vocabulary).
        processor: makes the batches.
        dataset: rows with ``prompt`` and ``images``.
        batch_size: rows a forward pass; bounds the memory, does not change the result.
    """
    import torch

    answers: list[str] = []
    with evaluating(model), torch.no_grad(), _one_thread():
        for start in range(0, len(dataset), batch_size):
            answers += _answers(model, processor, dataset[start : start + batch_size])
    return tuple(answers)


def accuracy(
    model: nn.Module, processor: ProcessorMixin, dataset: datasets.Dataset, *, batch_size: int = 128
) -> float:
    """The share of rows, 0 to 1, whose likeliest next token is the row's ``completion``.

    Args:
        model: see :func:`predict`.
        processor: see :func:`predict`.
        dataset: rows with ``prompt``, ``images`` and ``completion``; at least one.
        batch_size: rows a forward pass.
    """
    answers = predict(model, processor, dataset, batch_size=batch_size)
    expected: list[str] = dataset["completion"]
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(answers)


def _trainer(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    dataset: datasets.Dataset,
    peft_config: PeftConfig | None,
    settings: TrainingSettings,
    folder: str,
) -> SFTTrainer:
    from peft import PeftModel
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTTrainer

    if isinstance(model, PeftModel) == (peft_config is not None):
        raise ValueError("pass either a model with an adapter, or a base model and a peft_config")
    with warnings.catch_warnings():
        # PEFT still reads this attribute under its old name while it attaches an adapter.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        trainer = SFTTrainer(
            model=model,
            args=_arguments(settings, folder),
            train_dataset=dataset,
            processing_class=processor,
            peft_config=peft_config,
        )
    trainer.remove_callback(PrinterCallback)  # prints to stdout, which belongs to the command's data
    return trainer


def _arguments(settings: TrainingSettings, folder: str) -> SFTConfig:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # report a loss that is not a number as what it is
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(settings.warmup_steps, settings.steps // 2),
        seed=settings.seed,
        completion_only_loss=True,
        max_length=None,  # a cut prompt would lose picture tokens
        use_cpu=True,
        bf16=False,  # TRL's default; on such small matrices float32 is as fast and exact
        activation_checkpointing=False,  # on by default in TRL; saves memory that this model does not need
        dataloader_pin_memory=False,
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread inside, as many as before after.

    Matrices of width 64 gain nothing from a second thread, and on a busy machine the threads spend their
    time waiting for each other: twenty times as long, measured on two cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _keeping_forward(base: nn.Module) -> Iterator[None]:
    """Take back TRL's fused-head ``forward``, so that runs on one model do not stack their patches."""
    had = base.__dict__.get("forward")
    try:
        yield
    finally:
        if had is not None:
            base.__dict__["forward"] = had
        else:
            base.__dict__.pop("forward", None)


@dataclass
class _Watch:
    image_tokens: int = 0


@contextlib.contextmanager
def _watching(base: nn.Module, processor: ProcessorMixin) -> Iterator[_Watch]:
    """Count the picture tokens that reach the model, and stop a run whose pictures arrive unmarked."""
    watch = _Watch()
    image_token_id: int = processor.image_token_id

    def look(_module: nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if inputs.get("pixel_values") is not None:
            watch.image_tokens += _marked(inputs, image_token_id)

    # The inner model, because PEFT calls the outer one's forward directly, past its hooks.
    inner = getattr(base, "base_model", base)
    handle = inner.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield watch
    finally:
        handle.remove()


def _marked(inputs: Mapping[str, Any], image_token_id: int) -> int:
    ids: torch.Tensor = inputs["input_ids"]
    kinds: torch.Tensor | None = inputs.get("mm_token_type_ids")
    pictures = ids == image_token_id
    if kinds is None or not bool(((kinds == 1) == pictures).all()) or not bool(pictures.any()):
        raise GraftError(
            "a batch with pictures reached the model without the token types of its picture tokens",
            where="mm_token_type_ids",
            why=f"they must be 1 exactly where input_ids is {image_token_id}",
            help="use the processor made by graftkit.demo.processor.digit_processor()",
            code="demo-image-tokens",
        )
    return int(pictures.sum())


@contextlib.contextmanager
def _progress_bar(
    description: str, settings: TrainingSettings, console: Console | None
) -> Iterator[TrainerCallback]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers import TrainerCallback

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task(description, total=settings.steps, loss="")

        class Advance(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
            def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
                bar.update(task, completed=state.global_step)

            def on_log(
                self,
                _args: Any,
                _state: Any,
                _control: Any,
                logs: Mapping[str, float] | None = None,
                **_: Any,
            ) -> None:
                if logs and "loss" in logs:
                    bar.update(task, loss=f"loss {logs['loss']:.2f}")
                    _check_finite(logs["loss"])

        yield Advance()


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise GraftError(f"the training loss became {loss}", help="lower the learning rate", code="demo-diverged")


def _losses(history: list[dict[str, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry)


def _answers(model: nn.Module, processor: ProcessorMixin, rows: Mapping[str, Any]) -> list[str]:
    batch = processor(
        text=list(rows["prompt"]),
        images=list(rows["images"]),
        padding=True,
        padding_side="left",  # so that the answer follows the last position in every row
        return_tensors="pt",
        add_special_tokens=False,  # the prompt spells its own
    )
    logits: torch.Tensor = model(**on_device_of(model, batch)).logits
    ids: list[int] = logits[:, -1].argmax(-1).tolist()
    tokens: list[str] = processor.tokenizer.convert_ids_to_tokens(ids)
    return tokens
