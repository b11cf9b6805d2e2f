"""With ``enable()`` stock PEFT takes plain names; without it, it is stock PEFT again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.attaching.enable import disable, enable, is_enabled
from graftkit.checks.probes.forward import logits_of
from graftkit.errors import AdapterError

E2B = "google/gemma-4-E2B-it"
REFUSED = r"(?s)Target module .*is not supported"


def in_place() -> tuple[Any, ...]:
    """The functions of PEFT and transformers that stand where ``enable()`` puts its own."""
    loading = (vars(owner)["load_adapter"] for owner in (PeftModel, PeftAdapterMixin))
    reading = (vars(owner)["from_pretrained"] for owner in (PeftModel, peft.PeftMixedModel))
    return vars(BaseTuner)["__init__"], vars(BaseTuner)["inject_adapter"], *loading, *reading


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    stock = in_place()
    yield
    assert not is_enabled()
    assert in_place() == stock


class Clamped(nn.Module):
    """A wrapper as a user would write one."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.inside = nn.Linear(n_in, n_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x.clamp(-1, 1)).clamp(-0.5, 0.5)


class Nested(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.core = Clamped(n_in, n_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.core(x) * 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Clamped(8, 16)
        self.down = Nested(16, 8)
        self.gate = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(self.up(x) * self.gate(x)))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Toy(nn.Module):
    """Three layers, with wrapped linears, a plain one, and one called ``inside`` that is not wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.inside = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(self.model(x))


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def attached(model: nn.Module, config: Any, **options: Any) -> tuple[Any, set[str]]:
    with enable():
        adapted = get_peft_model(model, config, **options)
    return adapted, adapted_sites(adapted)


def ups(*numbers: int) -> set[str]:
    return {f"model.layers.{n}.up.inside" for n in numbers}


# ---- every tuner ----

TUNERS: list[tuple[str, Callable[..., Any]]] = [
    ("lora", lambda **o: LoraConfig(r=2, **o)),
    ("dora", lambda **o: LoraConfig(r=2, use_dora=True, **o)),
    ("adalora", lambda **o: peft.AdaLoraConfig(init_r=2, target_r=2, total_step=10, **o)),
    ("loha", lambda **o: peft.LoHaConfig(r=2, **o)),
    ("lokr", lambda **o: peft.LoKrConfig(r=2, **o)),
    ("oft", lambda **o: peft.OFTConfig(oft_block_size=4, **o)),
    ("ia3", lambda **o: peft.IA3Config(feedforward_modules=["up"], **o)),
    ("vera", lambda **o: peft.VeraConfig(r=2, **o)),
    ("vblora", lambda **o: peft.VBLoRAConfig(r=2, vector_length=4, num_vectors=8, **o)),
    ("randlora", lambda **o: peft.RandLoraConfig(r=2, **o)),
    ("hra", lambda **o: peft.HRAConfig(r=2, **o)),
    ("fourierft", lambda **o: peft.FourierFTConfig(n_frequency=5, **o)),
    ("miss", lambda **o: peft.MissConfig(r=2, **o)),
    ("c3a", lambda **o: peft.C3AConfig(block_size=4, **o)),
]


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in TUNERS])
def test_every_tuner_takes_a_wrappers_name(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises((ValueError, AttributeError, TypeError)):
        get_peft_model(toy(), make(target_modules=["up", "gate"]))
    config = make(target_modules=["up", "gate"])
    adapted, sites = attached(toy(), config)
    assert sites == ups(0, 1, 2) | {f"model.layers.{n}.gate" for n in range(3)}
    assert set(config.target_modules) == {"up", "gate"}, "the user's configuration was changed"
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape) * 0.1)
    adapted.eval().save_pretrained(tmp_path)
    x = torch.randn(2, 8)
    torch.testing.assert_close(PeftModel.from_pretrained(toy(), tmp_path).eval()(x), adapted(x), rtol=0, atol=0)
    with enable():
        again = PeftModel.from_pretrained(toy(), tmp_path).eval()
    torch.testing.assert_close(again(x), adapted(x), rtol=0, atol=0)


# ---- every spelling ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"target_modules": ["up"]}, ups(0, 1, 2), id="name"),
        pytest.param({"target_modules": ["1.up"]}, ups(1), id="suffix"),
        pytest.param({"target_modules": ["model.layers.2.up"]}, ups(2), id="full path"),
        pytest.param({"target_modules": ["model.layers.0.up", "up.inside"]}, ups(0, 1, 2), id="wrapper and inner"),
        pytest.param({"target_modules": r".*\.[01]\.up"}, ups(0, 1), id="regex"),
        pytest.param({"target_modules": r"(.*\.)?up(\.inside)?"}, ups(0, 1, 2), id="regex on both"),
        pytest.param(
            {"target_modules": ["down"]}, {f"model.layers.{n}.down.core.inside" for n in range(3)}, id="outer"
        ),
        pytest.param(
            {"target_modules": ["core"]}, {f"model.layers.{n}.down.core.inside" for n in range(3)}, id="middle"
        ),
        pytest.param({"target_modules": ["up"], "layers_to_transform": [0, 2]}, ups(0, 2), id="some layers"),
        pytest.param({"target_modules": ["up"], "layers_to_transform": 1}, ups(1), id="one layer"),
        pytest.param(
            {"target_modules": ["up"], "layers_to_transform": [2], "layers_pattern": "layers"},
            ups(2),
            id="layers pattern",
        ),
        pytest.param({"target_modules": ["up"], "exclude_modules": ["1.up"]}, ups(0, 2), id="excluded wrapper"),
        pytest.param(
            {"target_modules": ["up"], "exclude_modules": ["1.up.inside"]}, ups(0, 2), id="excluded inner"
        ),
        pytest.param(
            {"target_modules": ["up"], "exclude_modules": r"model\.layers\.0\..*"}, ups(1, 2), id="excluded regex"
        ),
        pytest.param(
            {"target_modules": ["up"], "exclude_modules": r".*\.0\.up"}, ups(1, 2), id="regex on wrapper"
        ),
        pytest.param({"target_modules": ["up"], "modules_to_save": ["layers.0"]}, ups(1, 2), id="saved whole"),
    ],
)
def test_every_spelling(options: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    adapted, sites = attached(toy(), LoraConfig(r=2, **options))
    assert sites == expected
    adapted.save_pretrained(tmp_path)
    assert adapted_sites(PeftModel.from_pretrained(toy(), tmp_path)) == expected


@pytest.mark.parametrize(
    ("pattern", "ranks"),
    [
        pytest.param({"up": 3}, {"0.up": 3, "1.up": 3, "0.gate": 2}, id="name"),
        pytest.param({"0.up": 3, "up": 4}, {"0.up": 3, "1.up": 4, "0.gate": 2}, id="first wins"),
        pytest.param({"up|gate": 3}, {"0.up": 3, "1.up": 3, "0.gate": 3}, id="regex on both"),
        pytest.param({"^model.layers.1.up": 3}, {"0.up": 2, "1.up": 3, "0.gate": 2}, id="anchored"),
        pytest.param({"layers.1.up$": 3, "gate": 4}, {"0.up": 2, "1.up": 3, "0.gate": 4}, id="dollar"),
        pytest.param({"inside": 3}, {"0.up": 3, "1.up": 3, "0.gate": 2}, id="inner name"),
    ],
)
def test_patterns_follow_the_wrappers(pattern: dict[str, int], ranks: dict[str, int]) -> None:
    config = LoraConfig(r=2, target_modules=["up", "gate"], rank_pattern=pattern, alpha_pattern=dict(pattern))
    adapted, _ = attached(toy(), config)
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")}
    for name, rank in ranks.items():
        layer: Any = next(m for n, m in layers.items() if n.removesuffix(".inside").endswith(name))
        assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, rank if rank != 2 else 8), name


def test_ia3s_feedforward_modules_follow() -> None:
    config = peft.IA3Config(target_modules=["up", "gate"], feedforward_modules=["up"])
    adapted, _ = attached(toy(), config)
    kinds = {n: m.is_feedforward for n, m in adapted.get_base_model().named_modules() if hasattr(m, "ia3_l")}
    assert len(kinds) == 6
    assert all(is_ff == n.endswith("up.inside") for n, is_ff in kinds.items())


# ---- nothing else changes ----

STOCK = [
    pytest.param({"target_modules": ["q_proj", "v_proj"]}, id="names"),
    pytest.param({"target_modules": "all-linear"}, id="all-linear"),
    pytest.param({"target_modules": r".*\.self_attn\.(q|k)_proj"}, id="regex"),
    pytest.param({"target_modules": ["q_proj"], "layers_to_transform": [1]}, id="layers"),
    pytest.param(
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["0.self_attn.q_proj"]}, id="exclude"
    ),
    pytest.param({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}}, id="rank pattern"),
    pytest.param({"target_modules": None}, id="defaults"),
    pytest.param({"target_modules": ["embed_tokens"]}, id="embedding"),
    pytest.param({"target_modules": [], "target_parameters": ["q_proj.weight"]}, id="parameters"),
]


@pytest.mark.parametrize("options", STOCK)
def test_a_model_without_wrappers_gets_the_same(
    twin_of: Callable[[str], nn.Module], options: dict[str, Any]
) -> None:
    stock = get_peft_model(twin_of("llama"), LoraConfig(r=2, **copy.deepcopy(options)))
    config = LoraConfig(r=2, **copy.deepcopy(options))
    adapted, sites = attached(twin_of("llama"), config)
    assert adapted.peft_config["default"] is config, "the configuration was copied"
    assert config.to_dict() == stock.peft_config["default"].to_dict()
    assert sites == adapted_sites(stock)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"target_modules": "all-linear"}, id="all-linear"),
        pytest.param({"target_modules": ["q_proj.linear"]}, id="inner names"),
        pytest.param({"target_modules": r".*language_model.*\.(q|v)_proj"}, id="plain modules"),
        pytest.param({"target_modules": None}, id="defaults"),
    ],
)
def test_targets_that_stock_peft_takes_stay(twin_of: Callable[[str], nn.Module], options: dict[str, Any]) -> None:
    stock = get_peft_model(twin_of(E2B), LoraConfig(r=2, **options))
    adapted, sites = attached(twin_of(E2B), LoraConfig(r=2, **options))
    assert adapted.peft_config["default"].to_dict() == stock.peft_config["default"].to_dict()
    assert sites == adapted_sites(stock)


def test_a_block_is_still_refused_with_a_pointer_to_a_plan() -> None:
    with enable(), pytest.raises(ValueError, match=REFUSED) as caught:
        get_peft_model(toy(), LoraConfig(target_modules=["up", "model"]))
    assert "gk.plan" in "".join(caught.value.__notes__)


def test_all_excluded_is_pefts_own_error() -> None:
    with enable(), pytest.raises(ValueError, match=r"(?i)exclude"):
        get_peft_model(toy(), LoraConfig(target_modules=["up"], exclude_modules=["up"]))


TOWERS = ["vision_tower", "audio_tower"]


@pytest.mark.parametrize("excluded", [TOWERS, r".*(vision|audio)_tower.*"], ids=["list", "regex"])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", r".*\.(q_proj|v_proj)(\.linear)?"], ids=str)
def test_excluded_towers_are_left_out(
    twin_of: Callable[[str], nn.Module], targets: Any, excluded: Any, tmp_path: Path
) -> None:
    adapted, sites = attached(twin_of(E2B), LoraConfig(r=2, target_modules=targets, exclude_modules=excluded))
    assert sites
    assert not any("_tower" in site for site in sites)
    adapted.save_pretrained(tmp_path)
    assert adapted_sites(PeftModel.from_pretrained(twin_of(E2B), tmp_path)) == sites


def test_an_exclusion_means_the_same_without_wrappers(twin_of: Callable[[str], nn.Module]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["layers.0"])
    _, sites = attached(twin_of("llama"), config)
    assert sites == {"model.layers.1.self_attn.q_proj"}
    assert set(config.exclude_modules) == {"layers.0"}, "the user's configuration was changed"


def test_a_trained_adapter_whose_exclusion_did_nothing_loads_whole(
    twin_of: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=TOWERS, init_lora_weights=False)
    adapted = get_peft_model(twin_of(E2B), config)
    assert any("_tower" in site for site in adapted_sites(adapted)), "PEFT excludes them by now"
    adapted.save_pretrained(tmp_path)
    with enable():
        loaded = PeftModel.from_pretrained(twin_of(E2B), tmp_path)
        loaded.load_adapter(tmp_path, "second")
        fresh: Any = twin_of(E2B)
        fresh.load_adapter(tmp_path)
    sites = adapted_sites(adapted)
    assert adapted_sites(loaded) == adapted_sites(loaded, "second") == adapted_sites(fresh) == sites


# ---- the switch ----


def test_counted_and_undone() -> None:
    stock = in_place()
    enable()
    with enable() as inner:
        assert is_enabled()
        assert not any(ours is theirs for ours, theirs in zip(in_place(), stock, strict=True))
    inner.__exit__(None, None, None)
    assert is_enabled(), "leaving a block twice counted twice"
    disable()
    disable()
    assert not is_enabled()
    assert in_place() == stock
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(toy(), LoraConfig(target_modules=["up"]))


def test_an_error_inside_switches_off() -> None:
    with pytest.raises(RuntimeError, match="mine"), enable():
        raise RuntimeError("mine")
    assert not is_enabled()


def test_somebody_elses_patch_on_top_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = vars(BaseTuner)["inject_adapter"]
    with enable():
        ours = vars(BaseTuner)["inject_adapter"]
        theirs = lambda self, *a, **k: ours(self, *a, **k)  # noqa: E731
        BaseTuner.inject_adapter = theirs
    try:
        assert vars(BaseTuner)["inject_adapter"] is theirs
        with pytest.raises(ValueError, match=REFUSED):
            get_peft_model(toy(), LoraConfig(target_modules=["up"]))
    finally:
        BaseTuner.inject_adapter = ours
        with enable():
            pass
    assert vars(BaseTuner)["inject_adapter"] is stock


def test_threads_with_models_of_their_own() -> None:
    results: list[set[str]] = []
    errors: list[BaseException] = []
    shared = LoraConfig(r=2, target_modules=["up", "gate"])
    models = [toy() for _ in range(12)]

    def work(model: nn.Module) -> None:
        try:
            with enable():
                results.append(adapted_sites(get_peft_model(model, shared)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 12
    assert all(sites == results[0] for sites in results)
    assert set(shared.target_modules) == {"up", "gate"}


# ---- every way in ----


def test_a_second_adapter_and_a_loaded_one(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    adapted, first = attached(twin_of(E2B), LoraConfig(r=2, target_modules=["q_proj"]))
    with enable():
        adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    second = adapted_sites(adapted, "second")
    assert first < second
    adapted.save_pretrained(tmp_path)
    plain = twin_of(E2B)
    again = PeftModel.from_pretrained(plain, tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert (adapted_sites(again), adapted_sites(again, "second")) == (first, second)


def test_mixed_models() -> None:
    with enable():
        adapted = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"]), mixed=True)
        adapted.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["up", "down"]))
    found = {n for n, m in adapted.named_modules() if hasattr(m, "hada_w1_a")}
    assert {n.removeprefix("base_model.model.") for n in found} == ups(0, 1, 2) | {
        f"model.layers.{n}.down.core.inside" for n in range(3)
    }


def test_transformers_own_add_adapter(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model: Any = twin_of(E2B)
    with pytest.raises(ValueError, match=REFUSED):
        twin_of(E2B).add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with enable():
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    batch = gk.example_batch(model)
    assert torch.equal(
        logits_of(PeftModel.from_pretrained(twin_of(E2B), tmp_path), batch), logits_of(model, batch)
    )
    fresh: Any = twin_of(E2B)
    fresh.load_adapter(tmp_path)
    assert torch.equal(logits_of(fresh, batch), logits_of(model, batch))


def test_moshi(twin_of: Callable[[str], nn.Module]) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(twin_of("moshi"), LoraConfig(r=2, target_modules=["q_proj"]))
    _, sites = attached(twin_of("moshi"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert sites
    assert all(site.endswith(("q_proj.linear", "v_proj.linear")) for site in sites)


def test_an_adapter_that_names_wrappers_loads(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    adapted, _ = attached(twin_of(E2B), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=REFUSED):
        PeftModel.from_pretrained(twin_of(E2B), tmp_path)
    with enable():
        again = PeftModel.from_pretrained(twin_of(E2B), tmp_path)
    batch = gk.example_batch(again.get_base_model())
    assert torch.equal(logits_of(again, batch), logits_of(adapted, batch))


# ---- an adapter loads whole, or not at all ----


def through_the_wrappers(base: nn.Module, folder: Path) -> Path:
    """Save an adapter as tools do that put adapter layers in the wrappers' places."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    attached(base, config)[0].save_pretrained(folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": ["q_proj"]}))
    edit_tensors(folder, lambda name: name.replace(".linear.lora_", ".lora_"))
    return folder


def edit_tensors(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Give every tensor another name; None drops it."""
    file = folder / "adapter_model.safetensors"
    named = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in named.items() if name is not None}, file, {"format": "pt"})


def refused(load: Callable[[], Any]) -> AdapterError:
    with enable(), pytest.raises(AdapterError) as caught:
        load()
    assert caught.value.code == "adapter-partly-loaded"
    assert "gk.migrate" in str(caught.value.help)
    return caught.value


def test_tensors_that_name_wrappers_do_not_load(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    folder = through_the_wrappers(twin_of(E2B), tmp_path)
    error = refused(lambda: PeftModel.from_pretrained(twin_of(E2B), folder))
    assert error.where == str(folder)
    refused(lambda: peft.PeftMixedModel.from_pretrained(twin_of(E2B), folder))
    fresh: Any = twin_of(E2B)
    refused(lambda: fresh.load_adapter(folder))
    assert not adapted_sites(fresh)


def test_a_second_adapter_that_does_not_load_is_taken_off(
    twin_of: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    folder = through_the_wrappers(twin_of(E2B), tmp_path)
    adapted, sites = attached(twin_of(E2B), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = logits_of(adapted, gk.example_batch(adapted.get_base_model()))
    refused(lambda: adapted.load_adapter(folder, "second"))
    assert set(adapted.peft_config) == {"default"}
    assert (adapted_sites(adapted), adapted_sites(adapted, "second")) == (sites, set())
    assert torch.equal(logits_of(adapted, gk.example_batch(adapted.get_base_model())), before)


def test_transformers_from_pretrained_of_an_adapters_folder(
    twin_of: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    base: Any = twin_of(E2B)
    base.save_pretrained(tmp_path / "base")
    folder = through_the_wrappers(twin_of(E2B), tmp_path / "adapter")
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    refused(lambda: type(base).from_pretrained(folder))


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(lambda name: None if ".0.gate" in name else name, id="missing"),
        pytest.param(lambda name: name.replace(".0.gate", ".7.gate"), id="of another layer"),
    ],
)
def test_any_adapter_that_is_not_whole(rename: Callable[[str], str | None], tmp_path: Path) -> None:
    get_peft_model(toy(), LoraConfig(r=2, target_modules=["gate"])).save_pretrained(tmp_path)
    edit_tensors(tmp_path, rename)
    refused(lambda: PeftModel.from_pretrained(toy(), tmp_path))


def test_prompts_load_as_without_it(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = get_peft_model(twin_of("llama"), config)
    adapted.save_pretrained(tmp_path)
    with enable():
        again = PeftModel.from_pretrained(twin_of("llama"), tmp_path)
    assert torch.equal(
        again.prompt_encoder["default"].embedding.weight, adapted.prompt_encoder["default"].embedding.weight
    )


@pytest.mark.filterwarnings("ignore:Some weights of PeftModel", "ignore:Found missing adapter keys")
def test_tensors_of_another_size_may_stay_out_where_the_caller_accepts_it(tmp_path: Path) -> None:
    get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with enable(), pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 8)), tmp_path)
    with enable():
        loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 8)), tmp_path, ignore_mismatched_sizes=True)
    assert adapted_sites(loaded) == {"0"}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"modules_to_save": ["norm"]}, id="modules saved whole"),
        pytest.param({"use_dora": True, "rank_pattern": {"up": 4}}, id="dora"),
    ],
)
def test_several_whole_adapters_load(options: dict[str, Any], tmp_path: Path) -> None:
    adapted, sites = attached(toy(), LoraConfig(r=2, target_modules=["up", "gate"], **options))
    adapted.save_pretrained(tmp_path)
    # Its tensors, too, contain the name "default".
    model, _ = attached(toy(), LoraConfig(r=2, target_modules=["down"]), adapter_name="not_default")
    with enable():
        for name in ("default", "second"):
            model.load_adapter(tmp_path, name)
            assert adapted_sites(model, name) == sites


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"], ids=str)
def test_transformers_loads_several_whole_adapters(
    twin_of: Callable[[str], nn.Module], targets: Any, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, modules_to_save=["embed_vision"])
    adapted, sites = attached(twin_of(E2B), config)
    adapted.save_pretrained(tmp_path)
    fresh: Any = twin_of(E2B)
    with enable():
        fresh.load_adapter(tmp_path)
        fresh.load_adapter(tmp_path, "second")
    assert adapted_sites(fresh) == adapted_sites(fresh, "second") == sites
    fresh.set_adapter("default")
    batch = gk.example_batch(twin_of(E2B))
    assert torch.equal(logits_of(fresh, batch), logits_of(adapted, batch))


LOADER = """
import sys, warnings
sys.modules["graftkit"] = None
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from peft import PeftModel
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
batch = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    torch.save(model(**batch).logits, sys.argv[4])
"""


def test_what_is_saved_loads_without_graftkit(e2b: Any, tmp_path: Path) -> None:
    batch = {name: value for name, value in gk.example_batch(e2b).items() if isinstance(value, torch.Tensor)}
    e2b.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 3}, init_lora_weights=False
    )
    adapted, sites = attached(e2b, config)
    assert any("tower" in site for site in sites)
    adapted.save_pretrained(tmp_path / "adapter")
    torch.save(batch, tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "batch.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", LOADER, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = torch.load(tmp_path / "logits.pt", weights_only=True).float()
    torch.testing.assert_close(loaded, logits_of(adapted, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_trl_takes_plain_names(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from graftkit.demo.processor import config_overrides, digit_tokenizer

    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7, 8, 9, 10]} for _ in range(2)])
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
    )

    def trainer() -> Any:
        return trl.SFTTrainer(
            model=gk.twin(E2B, overrides=config_overrides()),
            args=settings,
            train_dataset=rows,
            processing_class=digit_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )

    with pytest.raises(ValueError, match=REFUSED):
        trainer()
    with enable():
        running = trainer()
    assert any("vision_tower" in site for site in adapted_sites(running.model))
    assert running.train().global_step == 1
