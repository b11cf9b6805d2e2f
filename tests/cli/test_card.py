"""``graft card``: what it says is so, its header is the hub's, and what others wrote in the card stays."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.cli.running import fields_of, forked, graft, refused
from torch import nn

from graftkit.errors import GraftError
from graftkit.report.card import Card, with_card

HOSTILE = 'org/`x`" <!-- /graftkit --> <script>|\\'
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def base(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Path:
    model: Any = twin_of("llama")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(twin_of: Callable[[str], nn.Module], base: Path) -> Path:
    model: Any = twin_of("llama")
    model.name_or_path = str(base)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(base.parent / "adapter")
    torch.save(adapted(torch.arange(8)[None]).logits, base.parent / "logits.pt")
    return base.parent / "adapter"


def edit(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_the_card_says_what_was_adapted_and_checked(adapter: Path, base: Path) -> None:
    done = graft("card", str(adapter), "--base", str(base), "--json")
    assert done.returncode == 0, done.stderr
    made = fields_of(done)
    assert made["header"]["base_model"] == str(base)
    assert made["header"]["tags"] == ["lora", "graftkit"]
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    assert f"{layers} × `language attention.q`, {layers} × `language mlp.down`" in made["block"]
    tally = fields_of(forked("check", str(adapter), "--base", str(base), "--json"))["summary"]
    assert f"{tally['ok']} passed" in made["block"]


def test_what_was_not_checked_is_named(adapter: Path) -> None:
    block = fields_of(forked("card", str(adapter), "--json"))["block"]
    assert "without the base" in block
    assert "- unknown: GK501" in block


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_its_code_loads_the_adapter(adapter: Path, base: Path, task: str | None) -> None:
    edit(adapter, task_type=task)
    block = fields_of(forked("card", str(adapter), "--base", str(base), "--json"))["block"]
    found = PYTHON.search(block)
    assert found
    script = f"{found[1]}\nimport torch\nlogits = model(torch.arange(8)[None]).logits\n"
    script += "torch.testing.assert_close(logits, torch.load('logits.pt'))\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=base.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("vllm==0.32", "--max-lora-rank 8"),  # it takes 1, 8, 16, …
        ("sglang", "sglang.launch_server"),
        ("llama.cpp", "graft convert adapter"),
    ],
)
def test_it_says_how_to_serve(adapter: Path, target: str, said: str) -> None:
    block = fields_of(forked("card", str(adapter), "--target", target, "--json"))["block"]
    assert said in block.partition("### Serve")[2]


def test_an_adapter_that_the_engine_refuses_is_not_served(adapter: Path) -> None:
    edit(adapter, r=1024)  # larger than vLLM takes
    block = fields_of(forked("card", str(adapter), "--target", "vllm==0.32", "--json"))["block"]
    assert "vllm serve" not in block


def test_the_hub_reads_the_card_that_was_written(adapter: Path, base: Path) -> None:
    (adapter / "README.md").write_text(
        "---\nlicense: mit  # why\nbase_model: org/theirs\ntags: [theirs]\n---\n# Title\ntext\n"
    )
    for _ in range(2):  # the second replaces the block of the first
        done = forked("card", str(adapter), "--base", str(base), "--write")
        assert done.returncode == 0, done.stderr
    card = ModelCard.load(adapter / "README.md")
    assert (card.data.license, card.data.base_model, card.data.library_name) == ("mit", "org/theirs", "peft")
    assert card.data.tags == ["theirs", "lora", "graftkit"]
    assert card.text.count("### Checked") == 1
    assert "# Title\ntext" in card.text
    assert "# why" in (adapter / "README.md").read_text()


def test_a_header_that_cannot_be_read_is_left_alone(adapter: Path) -> None:
    text = "---\ntags: [\n---\n# Title\n"
    (adapter / "README.md").write_text(text)
    assert refused("card", adapter, "--write")["code"] == "card-header"
    assert (adapter / "README.md").read_text() == text


def test_names_of_strangers_stay_names(adapter: Path) -> None:
    edit(adapter, base_model_name_or_path=HOSTILE)
    made = fields_of(forked("card", str(adapter), "--json"))
    assert made["block"].count("<!--") == made["block"].count("-->") == 2
    assert "<script" not in made["block"]
    assert made["block"].count("`") % 2 == 0


def test_an_adapter_in_an_engines_form_is_refused(adapter: Path, tmp_path: Path, base: Path) -> None:
    forked("convert", str(adapter), str(tmp_path / "served"), "--to", "vllm", "--base", str(base))
    assert refused("card", tmp_path / "served")["code"] == "adapter-dialect"


MADE = Card({"library_name": "peft", "tags": ["lora"]}, "<!-- graftkit -->\nblock\n<!-- /graftkit -->")
FIELDS = st.dictionaries(st.text("abc", min_size=1), st.text("x: -#") | st.integers(), max_size=4)


@given(FIELDS, st.text("ab -#<!>\n"))
def test_any_card_keeps_its_own(fields: dict[str, Any], body: str) -> None:
    text = f"---\n{yaml.safe_dump(fields)}---\n{body}" if fields else body
    if not fields and body.startswith("---"):
        return
    once = with_card(text, MADE)
    assert with_card(once, MADE) == once
    assert body.strip() in once
    header = yaml.safe_load(re.split(r"^---\n", once, flags=re.MULTILINE)[1])
    assert {name: header[name] for name in fields if fields[name] != ""} == {
        name: value for name, value in fields.items() if value != ""
    }


def test_a_header_without_fields_is_refused() -> None:
    with pytest.raises(GraftError, match="card-header"):
        with_card("---\njust words\n---\n", MADE)
