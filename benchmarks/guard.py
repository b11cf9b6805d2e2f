"""A training step with the guard against the same step without it, within one run of transformers' Trainer.

One trainer trains one adapter; stretches of steps without and with the guard alternate, a stretch being as long
as it takes to log once. A stretch runs from the beginning of its first step to the beginning of the next
stretch, logging and the guard's own work included; the checks before the first step are not in it. Seconds are
CPU seconds of this process, so that other work on the machine does not count, on a single thread: threads that
wait for each other would count, too.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.harness.contest import Contest, Figure, Row, Setting, Turn

PEER = "without"
# Steps of a stretch, of which the guard measures one.
EVERY = 5


def contests(setting: Setting) -> Iterator[Contest]:
    """Yield a language model and a vision tower, both in float32."""
    layers, length = setting.of(quick=(1, 32), full=(12, 256))
    yield _contest(f"language, {layers} layers, 1 x {length}", *_language(layers, length))
    layers, side = setting.of(quick=(1, 6), full=(4, 24))
    yield _contest(f"clamped vision, {layers} layers, 1 x {side * side}", *_vision(layers, side))


def _contest(size: str, model: Any, batch: dict[str, Any]) -> Contest:
    row = Row("a step with the guard", PEER, Figure.CPU, aim=1.01)
    return Contest(f"{size}, one step of {EVERY} measured", (row,), partial(_turns, model, batch))


def _language(layers: int, length: int) -> tuple[Any, dict[str, Any]]:
    """Return a language model, of about 100 M parameters with twelve layers, and a batch."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, 32_000, (1, length))
    return Qwen3ForCausalLM(config), {"input_ids": ids, "labels": ids}


def _vision(layers: int, side: int) -> tuple[Any, dict[str, Any]]:
    """Return some layers of a vision tower at full width, with bounds around each of its linears, and a batch."""
    import torch
    from transformers import Gemma4VisionConfig, Gemma4VisionModel

    config = Gemma4VisionConfig(num_hidden_layers=layers, use_clipped_linears=True)
    model = Gemma4VisionModel(config)
    for name, buffer in model.named_buffers():
        if name.endswith(("_min", "_max")):
            buffer.fill_(-1.0 if name.endswith("_min") else 1.0)
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
    pixels = torch.rand(1, side * side, 3 * config.patch_size**2)
    return model, {"pixel_values": pixels, "pixel_position_ids": place.reshape(1, -1, 2)}


def _turns(model: Any, batch: dict[str, Any], count: int) -> Iterator[Turn]:
    """Train for as many turns, and for a stretch before them that is not counted."""
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    import graftkit as gk
    from graftkit.training.guard.guard import Guard

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    adapted = gk.attach(model, gk.plan(model, targets="all-linear", r=16))
    timed = _alternating()(Guard())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_steps=(2 * count + 1) * EVERY + 1,
            logging_steps=EVERY,
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = _trainer_class(Trainer)(
            model=adapted,
            args=args,
            train_dataset=[{}] * 64,
            data_collator=lambda _rows: dict(batch),
            callbacks=[timed],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    torch.set_num_threads(threads)
    for without, guarded in zip(timed.stretches[False], timed.stretches[True], strict=True):
        yield {PEER: {Figure.CPU: without / EVERY}, "graftkit": {Figure.CPU: guarded / EVERY}}


def _trainer_class(base: Any) -> Any:
    class Silent(base):  # type: ignore[misc]
        """Takes the model's own loss, or the mean square of its output; logs to the callbacks alone."""

        control: Any

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            output = model(**inputs)
            loss = getattr(output, "loss", None)
            return loss if loss is not None else output[0].float().pow(2).mean()

        def log(self, logs: Any, *_: Any) -> None:
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    return Silent


def _alternating() -> Any:
    from transformers import TrainerCallback

    class Alternating(TrainerCallback):  # type: ignore[misc]
        """Passes every second stretch of steps to the guard; the first one is not counted."""

        def __init__(self, guard: Any) -> None:
            self.guard = guard
            self.stretches: dict[bool, list[float]] = {False: [], True: []}
            self._began = 0.0
            self._guarded = False

        def on_train_begin(self, *given: Any, **named: Any) -> None:
            self.guard.on_train_begin(*given, **named)

        def on_step_begin(self, args: Any, state: Any, *given: Any, **named: Any) -> None:
            if state.global_step % args.logging_steps == 0:
                now = time.process_time()
                if state.global_step > args.logging_steps:
                    self.stretches[self._guarded].append(now - self._began)
                self._began, self._guarded = now, not self._guarded
            self._pass("on_step_begin", args, state, *given, **named)

        def on_pre_optimizer_step(self, *given: Any, **named: Any) -> None:
            self._pass("on_pre_optimizer_step", *given, **named)

        def on_step_end(self, *given: Any, **named: Any) -> None:
            self._pass("on_step_end", *given, **named)

        def on_log(self, *given: Any, **named: Any) -> None:
            self._pass("on_log", *given, **named)

        def _pass(self, event: str, *given: Any, **named: Any) -> None:
            if self._guarded:
                getattr(self.guard, event)(*given, **named)

    return Alternating
