"""``graft train`` against a hand-written script for TRL that does the same, on text and on pictures.

Both train the same LoRA on the same random model with the same rows and arguments, each in a process of its own;
the scripts are in ``benchmarks/scripts``, and that for TRL does not import graftkit. Steps are timed from the
beginning of the sixth one to the end of the last one, logging included; on the CPU in CPU seconds of one thread.
What comes before and after (imports, loading, the checks before the first step, the save, its checks and its
record, the report) shows in the row of the whole run.

On a GPU (``--device cuda``) the models are larger, and unsloth is a third side where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.contest import Contest, Device, Figure, Figures, Gap, Row, Setting, Size, in_turns
from benchmarks.harness.processes import cold, told

SCRIPTS = Path(__file__).parent / "scripts"
TRL, UNSLOTH = "TRL script", "unsloth script"
WORDS = 400


@dataclass(frozen=True)
class Scale:
    """How large a model and a run are.

    Args:
        hidden: width of the language model; it has a head for each 64 of it.
        layers: its layers.
        vision: width of the vision tower.
        steps: how many are timed.
        batch: rows a step.
        words: words a row.
        rows: rows in the data.
        dtype: of the weights.
    """

    hidden: int
    layers: int
    vision: int
    steps: int
    batch: int
    words: int
    rows: int = 512
    dtype: str = "float32"


SCALES = {
    (Device.CPU, Size.QUICK): Scale(hidden=128, layers=2, vision=64, steps=10, batch=2, words=16, rows=16),
    (Device.CPU, Size.FULL): Scale(hidden=384, layers=6, vision=256, steps=35, batch=4, words=64),
    (Device.CUDA, Size.QUICK): Scale(512, 4, 256, steps=10, batch=2, words=256, rows=64, dtype="bfloat16"),
    (Device.CUDA, Size.FULL): Scale(2048, 24, 1024, steps=60, batch=8, words=1000, dtype="bfloat16"),
}


def contests(setting: Setting) -> Iterator[Contest | Gap]:
    """Yield text and pictures on this device, and what is missing of the other one."""
    for device in Device:
        scale = SCALES[device, setting.size]
        for kind, write in (("text", write_text_base), ("pictures", write_picture_base)):
            words = f"{kind}, {device.value}, {scale.hidden} x {scale.layers} {scale.dtype}, {scale.steps} steps"
            sides = _sides(kind, device)
            if device is not setting.device:
                yield Gap(words, _rows(sides, device), f"needs --device {device.value}")
                continue
            missing = {UNSLOTH} if importlib.util.find_spec("unsloth") is None else set()
            if missing & set(sides):
                yield Gap(words, _rows((UNSLOTH,), device), "unsloth is not installed")
            yield from _contests(write, scale, words, [side for side in sides if side not in missing], setting)


def _sides(kind: str, device: Device) -> tuple[str, ...]:
    """Return the peers; unsloth is compared where it is meant to run."""
    return (TRL, UNSLOTH) if (kind, device) == ("text", Device.CUDA) else (TRL,)


def _rows(peers: Sequence[str], device: Device) -> tuple[Row, ...]:
    whole = Figure.CPU if device is Device.CPU else Figure.SECONDS
    return tuple(
        row
        for peer in peers
        for row in (
            Row("graft train", peer, Figure.RATE, aim=0.99),
            Row("graft train", peer, Figure.PEAK),
            Row("graft train, whole run", peer, whole),
        )
    )


def _contests(
    write: Callable[[Path, Scale], None], scale: Scale, words: str, peers: list[str], setting: Setting
) -> Iterator[Contest]:
    with tempfile.TemporaryDirectory(dir=setting.folder, prefix="graft-train-") as name:
        folder = Path(name)
        write(folder, scale)
        arguments = _arguments(scale, setting.device) | {"output_dir": str(folder / "out")}
        (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
        (folder / "recipe.yaml").write_text(json.dumps(_recipe(arguments)), encoding="utf-8")
        given = (folder / "base", folder / "rows", folder / "arguments.json")
        commands: dict[str, tuple[str | Path, ...]] = {
            "graftkit": (SCRIPTS / "sft_by_graft.py", folder / "recipe.yaml"),
            TRL: (SCRIPTS / "sft_by_trl.py", *given),
            UNSLOTH: (SCRIPTS / "sft_by_unsloth.py", *given),
        }
        sides = {side: partial(_run, commands[side]) for side in ("graftkit", *peers)}
        yield Contest(words, _rows(peers, setting.device), in_turns(sides, warmups=0))


def _run(command: tuple[str | Path, ...]) -> Figures:
    """Return the figures of a run; those that a script tells replace what the kernel says of the process."""
    # Threads that wait for each other would count, too.
    ran = cold(sys.executable, *command, env={"OMP_NUM_THREADS": "1"})
    return {**ran.figures, **{figure: value for figure in Figure if (value := told(ran).get(figure.key))}}


def _arguments(scale: Scale, device: Device) -> dict[str, Any]:
    cpu = {"use_cpu": True, "dataloader_pin_memory": False} if device is Device.CPU else {}
    return {
        "max_steps": scale.steps,
        "per_device_train_batch_size": scale.batch,
        "learning_rate": 1e-4,
        "logging_steps": 10,
        "save_steps": scale.steps,
        "max_length": None,
        "bf16": device is Device.CUDA,
        "activation_checkpointing": True,
        "disable_tqdm": True,
        "report_to": "none",
        "log_level": "error",
        "seed": 0,
        **cpu,
    }


def _recipe(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe, beside its data and its base; without a scope it adapts the language model alone."""
    return {
        "model": str(Path(arguments["output_dir"]).parent / "base"),
        "adapter": {"targets": "all-linear", "r": 16, "alpha": 32},
        "data": {"path": "rows"},
        "args": arguments,
    }


# ---- the models and their rows ----


def write_text_base(folder: Path, scale: Scale) -> None:
    """Save a random Llama with a tokenizer in ``base``, and rows of random words in ``rows``."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM

    tokenizer = _tokenizer()
    _save(LlamaForCausalLM(_language(tokenizer, scale)), tokenizer, folder / "base", scale)
    draw = random.Random(0)
    Dataset.from_dict({"text": [_words(draw, scale) for _ in range(scale.rows)]}).save_to_disk(folder / "rows")


def write_picture_base(folder: Path, scale: Scale) -> None:
    """Save a random Llava with its processor in ``base``, and rows of random pictures and words in ``rows``.

    Its pictures have 64 pixels a side, in 16 patches, on a CPU, and 336 in 576 patches on a GPU.
    """
    from datasets import Dataset, Features, Image, List, Value
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer, on_gpu = _tokenizer(), scale.dtype == "bfloat16"
    side, patch = (336, 14) if on_gpu else (64, 16)
    vision = CLIPVisionConfig(
        hidden_size=scale.vision,
        intermediate_size=4 * scale.vision,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.vision // 64,
        image_size=side,
        patch_size=patch,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_language(tokenizer, scale),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(side // patch) ** 2,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    _save(LlavaForConditionalGeneration(config), processor, folder / "base", scale)
    draw = random.Random(0)
    columns = {
        "images": [[_picture(draw, side)] for _ in range(scale.rows)],
        "prompt": ["<image> w1 w2"] * scale.rows,
        "completion": [_words(draw, scale) for _ in range(scale.rows)],
    }
    kinds = Features({"images": List(Image()), "prompt": Value("string"), "completion": Value("string")})
    Dataset.from_dict(columns, features=kinds).save_to_disk(folder / "rows")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokens = (*special.values(), "<image>", *(f"w{n}" for n in range(WORDS)))
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    image = {"image_token": "<image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=image, model_max_length=2048, **special
    )


def _language(tokenizer: Any, scale: Scale) -> Any:
    from transformers import LlamaConfig

    heads = scale.hidden // 64
    return LlamaConfig(
        vocab_size=4096 if scale.dtype == "float32" else 32_000,
        hidden_size=scale.hidden,
        intermediate_size=4 * scale.hidden,
        num_hidden_layers=scale.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _save(model: Any, processor: Any, folder: Path, scale: Scale) -> None:
    import torch

    model.to(getattr(torch, scale.dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)


def _words(draw: random.Random, scale: Scale) -> str:
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(scale.words))


def _picture(draw: random.Random, side: int) -> Any:
    from PIL import Image

    return Image.frombytes("RGB", (side, side), draw.randbytes(3 * side * side))
