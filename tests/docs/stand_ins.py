"""What stands in for what a reader has: twins for models of the hub, a few rows for a data set.

A page says it in one sentence: «with a twin of `qwen3` as `Qwen/Qwen3-0.6B`, sums as `sums.jsonl`». The first half
of an item names a function here, the second what it makes: a model in the hub's cache, or a file of the page's
folder. A block then runs as it is printed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.docs.pages import StandIn
from tests.training import gemma
from tests.training.small import preferences, save_model, trained_tokenizer, write_rows
from tests.training.tones import write_tones

import graftkit as gk

_TWIN = re.compile(r"a (?P<kind>twin|wide twin)(?: of `(?P<of>.+)`)?")
_REVISION = "0" * 40
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_QUESTIONS = [
    ("What is the capital of France?", "Paris."),
    ("What is two and two?", "Four."),
    ("Which way?", "This one."),
]
# For bitsandbytes: it packs no fewer than 32 outputs on a CPU with AVX512-BF16, and E2B's twin has linears of 8.
_WIDE = "google/gemma-4-31B-it"


class Models:
    """Models in the layout of the hub's cache, each made once.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, stand_ins: Sequence[StandIn], hub: Path, page: Path) -> None:
        """Make what a page asks for: its models and no others in ``hub``, its files in ``page``."""
        for old in hub.iterdir():
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        for each in stand_ins:
            adapter = re.fullmatch(r"an adapter for `(.+)`", each.what)
            if adapter is not None:
                base = next(other for other in stand_ins if other.name == adapter[1])
                _save_adapter(self._made(base), base.name, page / each.name)
                continue
            if _TWIN.fullmatch(each.what) is None:
                _FILES[each.what](page / each.name)
                continue
            made = self._made(each)
            if "/" in each.name:
                _link(made, hub, each.name)
            else:
                shutil.copytree(made, page / each.name)

    def _made(self, model: StandIn) -> Path:
        twin = _TWIN.fullmatch(model.what)
        assert twin is not None, model
        kind, of = twin["kind"], twin["of"] or model.name
        folder = self._folder / kind.replace(" ", "-") / of.replace("/", "--")
        return folder if folder.is_dir() else _MODELS[kind](folder, of)


def _save_adapter(base: Path, name: str, folder: Path) -> None:
    """Save a LoRA adapter on the language tower, as somebody would who trained it on the model of that name."""
    import transformers

    (kind,) = transformers.AutoConfig.from_pretrained(base).architectures
    model = getattr(transformers, kind).from_pretrained(base)
    model = gk.attach(model, gk.plan(model, scope=["language"], r=4, init_lora_weights=False))
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))


def _link(model: Path, hub: Path, name: str) -> None:
    """Put a model into the hub's cache, as if it had been downloaded."""
    repo = hub / f"models--{name.replace('/', '--')}"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "snapshots" / _REVISION).symlink_to(model)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(_REVISION)


def _twin(folder: Path, of: str) -> Path:
    if "gemma-4" in of:
        return gemma.save_base(folder, gemma.processor(gemma.template()), of)
    tokenizer = trained_tokenizer([], 259)
    tokenizer.chat_template = _CHATML
    return save_model(folder, tokenizer, of)


def _wide_twin(folder: Path, of: str) -> Path:
    assert "gemma-4" in of
    return _twin(folder, _WIDE)


def _prompts(file: Path) -> None:
    write_rows(file, [{"prompt": f"def f{n}(x):", "completion": f" Is {n}."} for n in range(16)])


def _conversations(file: Path) -> None:
    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    write_rows(file, [{"messages": turns(*_QUESTIONS[n % len(_QUESTIONS)])} for n in range(16)])


def _pairs(file: Path) -> None:
    write_rows(file, preferences(16))


def _sums(file: Path) -> None:
    write_rows(file, [{"prompt": f"{a} + {a} =", "answer": str(2 * a)} for a in range(8)])


def _pictures(folder: Path) -> None:
    """A folder of pictures, and a metadata.jsonl that says what they show."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random, rows = np.random.default_rng(0), []
    for at in range(16):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{at}.png")
        rows.append(
            {
                "file_name": f"{at}.png",
                "prompt": [{"role": "user", "content": "Which digit?"}],
                "completion": [{"role": "assistant", "content": str(at % 10)}],
            }
        )
    write_rows(folder / "metadata.jsonl", rows)


def _sounds(folder: Path) -> None:
    """A folder of sounds, and a metadata.jsonl that says what they are."""
    write_tones(folder, 16, seed=0)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    (folder / "rows.jsonl").unlink()
    write_rows(
        folder / "metadata.jsonl",
        [
            {
                "file_name": row["audio"],
                "prompt": [{"role": "user", "content": "Which tone?"}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in rows
        ],
    )


_MODELS: dict[str, Callable[[Path, str], Path]] = {
    "twin": _twin,
    "wide twin": _wide_twin,
}
_FILES: dict[str, Callable[[Path], Any]] = {
    "rows of prompts": _prompts,
    "conversations": _conversations,
    "pairs of answers": _pairs,
    "sums": _sums,
    "pictures": _pictures,
    "sounds": _sounds,
}
