"""A training step with the guard against the same step without it, as a ratio in one run.

Run: python benchmarks/guard.py [--logging-steps 5]
One trainer trains one adapter; stretches of steps with and without the guard alternate, a stretch being as long as
it takes to log once. What is compared is the fastest stretch of each kind, from the beginning of its first step
to the beginning of the next stretch, logging and the guard's own work included; the check before the first step is
timed separately. ``own`` is the share of a step that the guard's callbacks take, hooks left out. Seconds are CPU
seconds of this process, so that other work on the machine does not count, on a single thread: threads that wait
for each other would count, too.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from typing import Any

ROUNDS = 4
LENGTH = 256


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--logging-steps", type=int, default=5)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    every: int = options.logging_steps
    print(
        f"{'model':28} {'params':>7} {'adapter':>8} {'without':>9} {'with':>9} {'ratio':>6}"
        f" {'own':>7} {'before':>8}"
    )
    for name, model, batch in (_language(), _vision()):
        _measure(name, model, batch, every)


def _language() -> tuple[str, Any, dict[str, Any]]:
    """Return a language model of about 100 M parameters, in float32, and a batch."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, 32_000, (1, LENGTH))
    return f"language, 1 x {LENGTH}", Qwen3ForCausalLM(config), {"input_ids": ids, "labels": ids}


def _vision() -> tuple[str, Any, dict[str, Any]]:
    """Return some layers of a vision tower at full width, with bounds around each of its linears, and a batch."""
    import torch
    from transformers import Gemma4VisionConfig, Gemma4VisionModel

    config = Gemma4VisionConfig(num_hidden_layers=4, use_clipped_linears=True)
    model = Gemma4VisionModel(config)
    for name, buffer in model.named_buffers():
        if name.endswith(("_min", "_max")):
            buffer.fill_(-1.0 if name.endswith("_min") else 1.0)
    side, width = 24, 3 * config.patch_size**2
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).reshape(
        1, -1, 2
    )
    batch = {"pixel_values": torch.rand(1, side * side, width), "pixel_position_ids": place}
    return f"clamped vision, 1 x {side * side}", model, batch


def _measure(name: str, model: Any, batch: dict[str, Any], every: int) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    import graftkit as gk
    from graftkit.training.guard.guard import Guard

    adapted = gk.attach(model, gk.plan(model, targets="all-linear", r=16))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    params = sum(p.numel() for p in adapted.parameters())
    timed = _alternating()(Guard())
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_steps=2 * ROUNDS * every + every + 1,
            logging_steps=every,
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
    without, guarded = (min(timed.stretches[kind]) / every for kind in (False, True))
    figures = (
        f"{params / 1e6:6.0f}M {trained / 1e6:7.2f}M {without:8.3f}s {guarded:8.3f}s {guarded / without:6.3f}"
    )
    own = timed.own / len(timed.stretches[True]) / every / without
    print(f"{name:28} {figures} {100 * own:6.2f}% {timed.before:7.1f}s")


def _trainer_class(base: Any) -> Any:
    class Silent(base):  # type: ignore[misc]
        """Takes the model's own loss, or the mean square of its output; logs to the callbacks alone."""

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
            self.before = 0.0
            self.own = 0.0
            self.stretches: dict[bool, list[float]] = {False: [], True: []}
            self._began = 0.0
            self._guarded = False

        def on_train_begin(self, *given: Any, **named: Any) -> None:
            started = time.process_time()
            self.guard.on_train_begin(*given, **named)
            self.before = time.process_time() - started

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
                started = time.process_time()
                getattr(self.guard, event)(*given, **named)
                self.own += time.process_time() - started

    return Alternating


if __name__ == "__main__":
    main()
