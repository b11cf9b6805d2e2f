"""Base and update that nearly cancel: what is left is small, and still the nearest value to the exact result.

Each base is made for its adapter: every weight is the rounded negative of its update, so that only the rounding
remains. A sum in single precision misses that by many units in the last place.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tests.unit.merging.test_lora import CASES, TYPES, lora
from tests.unit.merging.test_tuners import KEEPS_THE_BASE, NO_MERGED_FORM, config_of

from graftkit.merging.merge import verify_merge
from graftkit.planning.config.methods import method_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.merging.conftest import Bench

Tensors = dict[str, torch.Tensor]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
# Half a unit in the last place of double precision.
UNIT = 2.0**-53
# More roundings than any method of PEFT makes on the way to one element of these small layers.
STEPS = 256


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rewrite(folder: Path, changed: Tensors) -> None:
    """Replace tensors of a checkpoint; each keeps its dtype."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        save_file(
            {n: changed[n].to(t.dtype) if n in changed else t for n, t in tensors.items()}, path, {"format": "pt"}
        )


def neighbours(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the next lower and the next higher numbers of the dtype, as float64."""
    whole = {2: torch.int16, 4: torch.int32}[values.element_size()]
    bits = values.view(whole)
    away, towards = (bits + 1).view(values.dtype).double(), (bits - 1).view(values.dtype).double()
    smallest = torch.ones((), dtype=whole).view(values.dtype).double()
    towards = torch.where(values == 0, -smallest, towards)
    yield torch.where(values == 0, smallest, away)
    yield towards


def assert_nearest(stored: torch.Tensor, exact: torch.Tensor, error: torch.Tensor) -> None:
    """Assert that no neighbour of a stored value is nearer, whatever the exact one is within its error."""
    distance = (stored.double() - exact).abs()
    for neighbour in neighbours(stored):
        nearer = (neighbour - exact).abs() + 2 * error < distance
        assert not nearer.any(), f"{int(nearer.sum())} of {nearer.numel()} are not the nearest value"


def without_base(adapter: Path) -> None:
    """Drop the base's embeddings, which PEFT saves with an adapter on them and which would replace new ones."""
    file = adapter / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.endswith(".base_layer.weight")}
    save_file(kept, file, {"format": "pt"})


def cancel(made: Bench, adapter: Path) -> None:
    """Make each weight that changes the rounded negative of its update."""
    before, merged = made.stored(made.base), made.exact(adapter)
    opposite = {n: before[n].double() - t.double() for n, t in merged.items() if n in before}
    changed = {n: t for n, t in opposite.items() if bool(t.any())}
    assert changed
    rewrite(made.base, changed)


def assert_exact_merge(made: Bench, adapter: Path, *, share: float) -> None:
    """Merge, and compare each element with PEFT's merge in double precision.

    Args:
        share: of the changed elements, how many at least must be left with less than a hundredth of the weight.
    """
    report = made.merge(adapter)
    assert report.evidence.misrounded == 0
    before, after, exact = made.stored(made.base), made.stored(made.out), made.exact(adapter)
    small = changed = 0
    for name, right in exact.items():
        if name not in before or torch.equal(right.double(), before[name].double()):
            continue
        base, right = (t.double().reshape(len(t), -1) for t in (before[name], right))
        sizes = (base.abs() + right.abs()).amax(dim=1, keepdim=True)
        assert_nearest(after[name].reshape(base.shape), right, STEPS * UNIT * sizes)
        changed += base.numel()
        small += int((right.abs() < 0.01 * base.abs()).sum())
    assert changed
    assert small >= share * changed
    made.assert_verifies(adapter)


# ---- every kind of change ----

# Their update is the same whatever the weight is, so that it cancels; the others meet their own new one.
ADDITIVE = (
    *("lora", "rslora", "adalora", "c3a", "fourierft", "gralora", "loha", "lokr", "pvera", "randlora"),
    *("tinylora", "vblora", "vera", "waveft"),
)
REPLACES = ("dora", "saved", "tokens", "biases")


def dtype_for(name: str) -> torch.dtype:
    """Spread the kinds over the dtypes: how an element is rounded does not depend on what was added."""
    return TYPES[zlib.crc32(name.encode()) % len(TYPES)]


@pytest.mark.parametrize("name", CASES)
def test_a_form_of_lora(name: str, bench: Callable[..., Bench]) -> None:
    model, options = CASES[name]
    made = bench(model, dtype=dtype_for(name))
    adapter = made.adapter(lora(**options), spread=0.02)
    without_base(adapter)
    cancel(made, adapter)
    assert_exact_merge(made, adapter, share=0.0 if any(word in name for word in REPLACES) else 0.5)


@pytest.mark.parametrize("method", [m for m in method_names() if m not in (*NO_MERGED_FORM, *KEEPS_THE_BASE)])
def test_a_method(method: str, bench: Callable[..., Bench]) -> None:
    made = bench("bert" if method == "beft" else "llama", dtype=dtype_for(method))
    adapter = made.adapter(config_of(made.model, method), spread=0.05)
    cancel(made, adapter)
    assert_exact_merge(made, adapter, share=0.5 if method in ADDITIVE else 0.0)


# ---- written out ----


@dataclass(frozen=True)
class Product:
    """The update of one LoRA layer, written out in double precision."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def update(self) -> torch.Tensor:
        return self.scale * (self.b @ self.a)

    @property
    def sizes(self) -> torch.Tensor:
        """The sum of the sizes of all that is added."""
        return abs(self.scale) * (self.b.abs() @ self.a.abs())

    @property
    def error(self) -> torch.Tensor:
        return 2 * (len(self.a) + 4) * UNIT * self.sizes


def product(adapter: Path, path: str) -> Product:
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"].double() for side in "AB")
    return Product(a, b, config["lora_alpha"] / config["r"])


def scatter(adapter: Path, seed: int, exponents: int) -> None:
    """Replace an adapter's values by random ones of sizes between 1 and two to that power."""
    file, rng = adapter / "adapter_model.safetensors", torch.Generator().manual_seed(seed)

    def values(shape: torch.Size) -> torch.Tensor:
        sizes = torch.randint(-abs(exponents), 1, shape, generator=rng)
        return torch.randn(shape, generator=rng) * 2.0**sizes * (2.0**exponents if exponents > 0 else 1.0)

    save_file({name: values(t.shape) for name, t in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", TYPES, ids=name_of)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    rank=st.sampled_from([1, 3, 16, 48]),
    alpha=st.sampled_from([1, 3, 16]),
    exponents=st.integers(-6, 4),
)
def test_any_lora(
    dtype: torch.dtype, seed: int, rank: int, alpha: int, exponents: int, bench: Callable[..., Bench]
) -> None:
    made = bench("llama", dtype=dtype)
    adapter = made.adapter(lora(target_modules=["q_proj", "down_proj"], r=rank, lora_alpha=alpha))
    scatter(adapter, seed, exponents)
    rewrite(made.base, {f"{path}.weight": -product(adapter, path).update for path in (Q, DOWN)})
    shutil.rmtree(made.out, ignore_errors=True)
    made.merge(adapter)
    for path in (Q, DOWN):
        base, after = (made.stored(folder)[f"{path}.weight"] for folder in (made.base, made.out))
        update = product(adapter, path)
        assert_nearest(after, base.double() + update.update, update.error)
    made.assert_verifies(adapter)


@pytest.mark.parametrize("dtype", TYPES, ids=name_of)
def test_dora_whose_lengths_are_what_is_left(dtype: torch.dtype, bench: Callable[..., Bench]) -> None:
    """The sum cancels before its rows get their lengths: its errors grow with them."""
    made = bench("llama", dtype=dtype)
    adapter = made.adapter(lora(target_modules=["q_proj"], use_dora=True), spread=0.02)
    lengths = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{Q}.lora_magnitude_vector"]
    update = product(adapter, Q)
    rewrite(made.base, {f"{Q}.weight": -update.update})
    made.merge(adapter)
    base, after = (made.stored(folder)[f"{Q}.weight"] for folder in (made.base, made.out))
    left = base.double() + update.update
    factor = (lengths.double() / left.norm(dim=1)).unsqueeze(1)
    growth = (update.sizes.norm(dim=1) / left.norm(dim=1)).unsqueeze(1)
    error = factor * (update.error + STEPS * UNIT * left.abs() * (1 + growth))
    assert_nearest(after, factor * left, error)
    made.assert_verifies(adapter)


@pytest.mark.parametrize("dtype", TYPES, ids=name_of)
def test_adapters_that_cancel_each_other(dtype: torch.dtype, bench: Callable[..., Bench]) -> None:
    """Three kinds of change on one weight; the base is the rest of the first two."""
    made = bench("llama", dtype=dtype)
    one = made.adapter(lora(target_modules=["q_proj"]), "one")
    two = made.adapter(lora(target_modules=["q_proj"], r=40), "two")
    three = made.adapter(config_of(made.model, "ia3"), "three", spread=0.1)
    name, weights = f"{Q}.weight", (1.0, -0.37, 1e-6)
    first, second = product(one, Q), product(two, Q)
    rewrite(made.base, {name: -(weights[0] * first.update + weights[1] * second.update)})
    made.merge(one, two, three, weights=list(weights))
    base, after = (made.stored(folder)[name] for folder in (made.base, made.out))
    scaled = made.exact(three)[name].double() - base.double()
    exact = base.double() + weights[0] * first.update + weights[1] * second.update + weights[2] * scaled
    error = first.error + second.error + 4 * STEPS * UNIT * scaled.abs().amax() * weights[2]
    assert_nearest(after, exact, error + 4 * UNIT * base.abs())
    assert verify_merge(made.base, dict(zip((one, two, three), weights, strict=True)), made.out).ok


def test_pissa_subtracts_its_start(bench: Callable[..., Bench]) -> None:
    """What PiSSA leaves of the base is cancelled by what was trained."""
    made = bench("llama", dtype=torch.float32)
    adapter = made.adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    whole = torch.linalg.svd(made.stored(made.base)[f"{Q}.weight"])
    rewrite(made.base, {f"{Q}.weight": (whole.U[:, :8] * whole.S[:8]) @ whole.Vh[:8]})
    with made.quiet():
        loaded: Any = PeftModel.from_pretrained(made.loaded(dtype=torch.float32), str(adapter))
    residual = loaded.get_submodule(f"base_model.model.{Q}.base_layer").weight.detach()
    rest = torch.linalg.svd(residual)
    trained = {"A": rest.Vh[:4].contiguous(), "B": (-rest.U[:, :4] * rest.S[:4]).contiguous()}
    file = adapter / "adapter_model.safetensors"
    others = {n: t for n, t in load_file(file).items() if Q not in n}
    own = {f"base_model.model.{Q}.lora_{side}.weight": t for side, t in trained.items()}
    save_file({**others, **own}, file, {"format": "pt"})
    made.merge(adapter)
    update, after = product(adapter, Q), made.stored(made.out)[f"{Q}.weight"]
    exact = residual.double() + update.update
    assert bool((exact.abs() < 1e-4 * residual.abs().amax()).all())
    assert_nearest(after, exact, update.error + 4 * UNIT * made.stored(made.base)[f"{Q}.weight"].abs().double())
