"""Adapters that the known workarounds make: what graftkit says of each is compared with what was really trained.

An adapter is trained for a few steps on a base with finite bounds, and saved as the workaround saves it. Its
logits in the model that trained it are the truth. graftkit may refuse, warn, or not know; where it says that all
is well, the logits are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.peers import workarounds as ways
from torch import Tensor, nn

import graftkit as gk
from graftkit.adapters.trained_bounds import TrainedBounds
from graftkit.attaching.attach import adapted_sites
from graftkit.checks.check_merged import check_merged
from graftkit.checks.probes.forward import logits_of
from graftkit.errors import AdapterError, MergeError
from graftkit.findings import Severity

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

E2B = "google/gemma-4-E2B-it"
STEPS, LEARNING_RATE = 5, 0.02
# Of logits: single precision, and several orders below what a missing clamp changes.
SAME, DIFFERENT = 1e-3, 0.5


@dataclass(frozen=True)
class Way:
    """A workaround.

    Attributes:
        make: the adapted model on a base's folder.
        in_place: whether its tensors name the wrapper.
        without_clamp: what a user who knows it says to ``gk.migrate``; None where neither is right.
        replaced: which wrappers it took away: "adapted", "all", or None.
    """

    make: Callable[[Path], PeftModel]
    in_place: bool
    without_clamp: bool | None
    replaced: str | None = None

    @property
    def same_on_the_base(self) -> bool:
        """Whether the adapter computes on the base what was trained, once its names fit."""
        return self.without_clamp is False


WAYS = {
    way.make.__name__: way
    for way in (
        Way(ways.redirect_to_the_inside, False, False),
        Way(ways.clamped_lora_layer, True, False),
        Way(ways.redirect_in_place, True, True, "adapted"),
        Way(ways.permanent_unwrap, True, True, "all"),
        Way(ways.plain_linear_class, True, True, "all"),
        Way(ways.wrapper_as_base_layer, True, None),
        Way(ways.linear_that_clamps_itself, True, None),
        Way(ways.wrapper_that_only_passes, False, True, "all"),
    )
}
# Its files are those of an adapter that was trained with the clamps.
INVISIBLE = "wrapper_that_only_passes"
VISIBLE = [name for name in WAYS if name != INVISIBLE]


@dataclass(frozen=True)
class Trained:
    """A trained adapter: its folder, the folder that its own tool merged it into, and its logits."""

    way: Way
    adapter: Path
    merged: Path
    logits: Tensor


@dataclass(frozen=True)
class Bench:
    """A base on disk, a batch for it, and the adapters trained so far."""

    folder: Path
    batch: dict[str, Any]
    made: dict[str, Trained]

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def logits(self, model: nn.Module) -> Tensor:
        return logits_of(model, self.batch)

    def trained(self, name: str) -> Trained:
        if name not in self.made:
            self.made[name] = self._train(name)
        return self.made[name]

    def _train(self, name: str) -> Trained:
        torch.manual_seed(0)
        folder, model = self.folder / name, WAYS[name].make(self.base)
        losses = train(model, self.batch)
        assert losses[-1] < losses[0] - 1
        logits = self.logits(model)
        model.save_pretrained(folder / "adapter")
        merged: Any = model.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        return Trained(WAYS[name], folder / "adapter", folder / "merged", logits)

    def loaded(self, adapter: Path) -> PeftModel:
        """The adapter on the base, in stock PEFT unless graftkit is enabled."""
        return PeftModel.from_pretrained(ways.load(self.base), adapter).eval()

    def apart(self, trained: Trained, model: nn.Module) -> float:
        return float((self.logits(model) - trained.logits).abs().max())


def train(model: PeftModel, batch: dict[str, Any]) -> list[float]:
    """Train for a few steps; returns the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    return losses


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("workarounds")
    model = gk.twin(E2B)
    model.save_pretrained(folder / "base")
    return Bench(folder, gk.example_batch(model), {})


def migrated(trained: Trained, bench: Bench, out: Path, **options: Any) -> tuple[Any, list[str]]:
    """Migrate; returns the result, and the codes of the warnings."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        result = gk.migrate(trained.adapter, ways.load(bench.base), out, **options)
    return result, [str(w.message).partition(":")[0] for w in raised if str(w.message).startswith("GK")]


def not_ok(report: gk.Report) -> dict[str, Severity]:
    """What is not ok about the adapter; rules on the base's own files (GK0xx) are not asked here."""
    found = {finding.code: finding.severity for finding in report if finding.severity is not Severity.OK}
    return {code: severity for code, severity in found.items() if not code.startswith("GK0")}


# ---- the truth, and stock PEFT ----


@pytest.mark.parametrize("name", WAYS)
def test_the_workaround_is_what_it_is_said_to_be(bench: Bench, name: str, tmp_path: Path) -> None:
    """Under its own names or after a migration, the adapter computes on the base what the table says."""
    trained = bench.trained(name)
    assert bench.apart(trained, ways.load(bench.base)) > DIFFERENT, "it trained nothing"
    result, _ = migrated(trained, bench, tmp_path / "out")
    assert bool(result.renamed) == trained.way.in_place
    apart = bench.apart(trained, bench.loaded(tmp_path / "out"))
    assert apart < SAME if trained.way.same_on_the_base else apart > DIFFERENT


@pytest.mark.parametrize("name", WAYS)
def test_stock_peft_refuses_names_of_wrappers(bench: Bench, name: str) -> None:
    if name == INVISIBLE:
        assert bench.loaded(bench.trained(name).adapter)
        return
    with pytest.raises(ValueError, match="is not supported"):
        bench.loaded(bench.trained(name).adapter)


# ---- what graftkit says ----


@pytest.mark.parametrize("name", VISIBLE)
def test_enable_loads_what_was_trained_or_nothing(bench: Bench, name: str) -> None:
    trained = bench.trained(name)
    with gk.enable():
        if trained.way.in_place:
            with pytest.raises(AdapterError) as caught:
                bench.loaded(trained.adapter)
            assert caught.value.code == "adapter-partly-loaded"
            model: Any = ways.load(bench.base)
            with pytest.raises(AdapterError) as caught:
                model.load_adapter(trained.adapter)
            assert caught.value.code == "adapter-partly-loaded"
        else:
            assert bench.apart(trained, bench.loaded(trained.adapter)) < SAME


@pytest.mark.parametrize("name", VISIBLE)
def test_check_of_what_the_tool_saved(bench: Bench, name: str) -> None:
    trained = bench.trained(name)
    found = not_ok(gk.check(trained.adapter, ways.load(bench.base)))
    wrapped = {"GK507": Severity.ERROR}
    in_place = {"GK501": Severity.ERROR, "GK509": Severity.WARNING}
    assert found == (wrapped | in_place if trained.way.in_place else wrapped)


@pytest.mark.parametrize("name", VISIBLE)
def test_a_migration_warns_where_it_cannot_know(bench: Bench, name: str, tmp_path: Path) -> None:
    trained = bench.trained(name)
    result, warned = migrated(trained, bench, tmp_path / "out")
    assert result.bounds is (TrainedBounds.UNKNOWN if trained.way.in_place else None)
    assert warned == (["GK509"] if trained.way.in_place else [])
    found = not_ok(gk.check(tmp_path / "out", ways.load(bench.base)))
    assert found == ({"GK509": Severity.WARNING} if trained.way.in_place else {})
    if not warned and not found:
        assert bench.apart(trained, bench.loaded(tmp_path / "out")) < SAME


@pytest.mark.parametrize("name", VISIBLE)
def test_a_merge_is_what_was_trained_or_refused(bench: Bench, name: str, tmp_path: Path) -> None:
    trained = bench.trained(name)
    migrated(trained, bench, tmp_path / "out")
    if trained.way.in_place:
        with pytest.raises(MergeError) as caught:
            gk.merge(bench.base, tmp_path / "out", tmp_path / "merged")
        assert caught.value.code == "merge-trained-bounds-unknown"
        assert not (tmp_path / "merged").exists()
    else:
        gk.merge(bench.base, tmp_path / "out", tmp_path / "merged")
        assert bench.apart(trained, ways.load(tmp_path / "merged")) < SAME


# ---- for a user who knows how it was trained ----


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.without_clamp])
def test_trained_without_the_clamp(bench: Bench, name: str, tmp_path: Path) -> None:
    trained = bench.trained(name)
    result, warned = migrated(trained, bench, tmp_path / "out", trained_without_clamp=True)
    assert (result.bounds, warned) == (TrainedBounds.REMOVED, ["GK509"])
    assert not_ok(gk.check(tmp_path / "out", ways.load(bench.base))) == {"GK509": Severity.ERROR}
    with pytest.raises(MergeError) as caught:
        gk.merge(bench.base, tmp_path / "out", tmp_path / "merged")
    assert caught.value.code == "merge-trained-without-bounds"
    model = bench.loaded(tmp_path / "out")
    assert bench.apart(trained, model) > DIFFERENT
    paths = result.wrappers if trained.way.replaced == "adapted" else None
    with gk.unwrap(model, paths=paths, allow_change=True):
        assert bench.apart(trained, model) < SAME


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.without_clamp is False])
def test_trained_with_the_clamp(bench: Bench, name: str, tmp_path: Path) -> None:
    trained = bench.trained(name)
    result, warned = migrated(trained, bench, tmp_path / "out", trained_without_clamp=False)
    assert (result.bounds, warned) == (TrainedBounds.KEPT, [])
    assert not not_ok(gk.check(tmp_path / "out", ways.load(bench.base)))
    assert bench.apart(trained, bench.loaded(tmp_path / "out")) < SAME
    gk.merge(bench.base, tmp_path / "out", tmp_path / "merged")
    assert bench.apart(trained, ways.load(tmp_path / "merged")) < SAME


def test_what_no_file_shows(bench: Bench, tmp_path: Path) -> None:
    """Only a user can say that the wrapper was there and its clamps were not; until then nothing objects."""
    trained = bench.trained(INVISIBLE)
    result, warned = migrated(trained, bench, tmp_path / "out")
    assert (result.changed, result.bounds, warned) == (False, None, [])
    assert bench.apart(trained, bench.loaded(trained.adapter)) > DIFFERENT
    migrated(trained, bench, tmp_path / "stated", trained_without_clamp=True)
    assert not_ok(gk.check(tmp_path / "stated", ways.load(bench.base))) == {"GK509": Severity.ERROR}


# ---- what the tools merged themselves ----


@pytest.mark.parametrize("name", WAYS)
def test_a_checkpoint_that_the_tool_merged(bench: Bench, name: str, tmp_path: Path) -> None:
    """Said to be the merge only if it computes what was trained."""
    trained = bench.trained(name)
    migrated(trained, bench, tmp_path / "out", trained_without_clamp=trained.way.without_clamp)
    if not trained.way.same_on_the_base:
        with pytest.raises(MergeError):
            check_merged(trained.merged, bench.base, tmp_path / "out")
        return
    found = not_ok(check_merged(trained.merged, bench.base, tmp_path / "out"))
    if trained.way.in_place:
        assert Severity.ERROR in found.values()
    else:
        # PEFT's own merge is not rounded correctly in single precision; nothing else may differ.
        assert found.keys() <= {"GK606"}
        assert bench.apart(trained, ways.load(trained.merged)) < SAME


# ---- configurations, under enable() ----


@pytest.mark.parametrize(
    ("options", "towers"),
    [
        pytest.param({}, True, id="names of wrappers"),
        pytest.param({"target_modules": r".*\.(q_proj|down_proj)(\.linear)?"}, True, id="optional linear"),
        pytest.param({"exclude_modules": ["vision_tower", "audio_tower"]}, False, id="excluded towers"),
        pytest.param({"exclude_modules": r".*(vision|audio)_tower.*"}, False, id="excluded by regex"),
        pytest.param(
            {"target_modules": "all-linear", "exclude_modules": ["vision_tower", "audio_tower"]},
            False,
            id="all-linear without towers",
        ),
        pytest.param({"rank_pattern": {"q_proj": 6}}, True, id="ranks of wrappers"),
    ],
)
def test_what_enable_trains(bench: Bench, options: dict[str, Any], towers: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with gk.enable():
        model = get_peft_model(ways.load(bench.base), ways.config(**options))
    sites = adapted_sites(model)
    assert any("_tower" in site for site in sites) is towers
    assert any("language_model" in site for site in sites)
    losses = train(model, bench.batch)
    assert losses[-1] < losses[0] - 1
    model.save_pretrained(tmp_path / "adapter")
    trained = Trained(WAYS["redirect_to_the_inside"], tmp_path / "adapter", tmp_path, bench.logits(model))
    assert not not_ok(gk.check(trained.adapter, ways.load(bench.base)))
    again = bench.loaded(trained.adapter)
    assert adapted_sites(again) == sites
    assert bench.apart(trained, again) < SAME
    gk.merge(bench.base, trained.adapter, tmp_path / "merged")
    assert bench.apart(trained, ways.load(tmp_path / "merged")) < SAME
