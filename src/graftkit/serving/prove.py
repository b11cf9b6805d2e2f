"""``prove()``: serve a base and its adapter in the real engine, and compare its outputs with PEFT's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit._version import SCHEMA_VERSION
from graftkit.adapters.file import read_adapter
from graftkit.attaching.attach import attach, attach_stock
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.runner import run
from graftkit.checks.probes.live_adapter import is_untrained
from graftkit.checks.rules import all_rules
from graftkit.engines.outcome import Outcome, Served
from graftkit.errors import AdapterError
from graftkit.findings import Report
from graftkit.modeling.random_state import seeding
from graftkit.modeling.stock_peft import load
from graftkit.planning.plan import plan
from graftkit.progress import Progress
from graftkit.recipes.settings import CheckSettings
from graftkit.serving.bisect import by_site, first_not_applied, scaled_by
from graftkit.serving.comparing import Bench, Case
from graftkit.serving.engine_process import TIME_LIMIT
from graftkit.serving.engine_twin import write_engine_twin
from graftkit.serving.install import engine_python
from graftkit.serving.reference import give_effect, log_probabilities, text_prefixes
from graftkit.serving.served_form import as_peft, in_form_of, save_stock
from graftkit.surveying.sources.load_model import load_model
from graftkit.surveying.sources.local import existing_path
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.text import first_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The rule that judges what was served.
_RULE = "GK706"
# Rank of a fresh adapter.
_RANK = 4
# Outcomes after which the sites are looked at one by one.
_IN_PART = frozenset({Outcome.DIFFERENT, Outcome.SCALED, Outcome.IGNORED})


@dataclass(frozen=True)
class Proof:
    """What an engine made of an adapter.

    Attributes:
        model: the model as it was named, or the merged checkpoint.
        on_twin: whether a tiny random model of its architecture was served in its place.
        adapter: the folder of the adapter; None for a fresh one.
        target: the engine as it was named.
        converted: whether the adapter was served in the engine's form; otherwise as PEFT writes it, or merged.
        served: what was measured.
        sites: module -> what was measured with its part of the adapter alone, where the whole was not applied.
        base: what the adapter was merged into; None where it was not merged, or the base was not named.
    """

    model: str
    on_twin: bool
    adapter: str | None
    target: str
    converted: bool
    served: Served
    sites: Mapping[str, Served] = field(default_factory=dict)
    base: str | None = None

    @property
    def report(self) -> Report:
        """The finding on it (GK706)."""
        return report_on(self.served)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "base": self.base,
            "on_twin": self.on_twin,
            "adapter": self.adapter,
            "target": self.target,
            "converted": self.converted,
            "served": self.served.to_dict(),
            "sites": {site: found.to_dict() for site, found in self.sites.items()},
            "findings": self.report.to_dict()["findings"],
            "summary": self.report.summary,
        }


def report_on(served: Served) -> Report:
    """Return the finding of the rule that judges what was served."""
    rules = [rule for rule in all_rules() if rule.code == _RULE]
    return run(rules, CheckContext(Inputs(served=served), CheckSettings()))


def prove(
    model: str,
    *,
    target: str,
    adapter: str | Path | None = None,
    on_twin: bool | None = None,
    python: str | Path | None = None,
    as_is: bool = False,
    engine_options: Mapping[str, Any] | None = None,
    time_limit: float = TIME_LIMIT,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    **request: Any,
) -> Proof:
    """Serve a base with and without an adapter in the real engine, and compare its log-probabilities with PEFT's.

    The engine runs in its own Python. It is asked for the token after 21 short prefixes, in float32.

    Args:
        model: a folder with weights, which is served itself, or what ``gk.twin`` takes, whose twin is served.
        target: "vllm", "llama.cpp" or "mlx".
        adapter: an adapter's folder; one in the engine's own form is served as it is. With a twin only its
            configuration is used, on random factors: its weights fit the model itself. None: a fresh adapter by
            ``request``.
        on_twin: serve a twin even of a folder with weights. None: only of what is not such a folder.
        python: the engine's Python or the folder of its environment; see ``install.engine_python``.
        as_is: serve the files as PEFT writes them, as far as the engine, or its own converter, reads them.
            Otherwise they are converted to the engine's form.
        engine_options: further arguments of the engine: of ``vllm.LLM``, ``llama_cpp.Llama``, ``mlx_lm`` loading.
        time_limit: seconds for one process of the engine.
        seed: of the twin, the fresh adapter and the prefixes.
        on_progress: called before each step.
        request: arguments of ``gk.plan`` for a fresh adapter; without any, a LoRA of rank 4 on all linears.

    Raises:
        SourceError, BuildError, PlanError, AttachError, AdapterError: base or adapter cannot be read or made.
        ConvertError: the adapter has no such form; the error says what to do instead.
        EngineError: the engine is unknown, not installed, refuses the base, or its process failed; see
            ``engine_process.serve``.
    """
    report = on_progress or (lambda _progress: None)
    engine_at = engine_python(target, python)
    own = None if on_twin is True else weights_folder(model)
    with tempfile.TemporaryDirectory(prefix="graftkit-prove-") as temporary, quiet_transformers():
        work = Path(temporary)
        report(Progress("building the twin" if own is None else "loading the model", 0, None))
        base = own or work / "base"
        live = write_engine_twin(model, base, seed=seed, engine=target) if own is None else load_in_float32(own)
        prefixes = text_prefixes(live.config, seed=seed)
        expected = log_probabilities(live, prefixes)
        bench = Bench(target, engine_at, base, prefixes, expected, engine_options or {}, time_limit)
        report(Progress("computing what PEFT makes of the adapter", 0, None))
        if own is not None and adapter is not None:
            given = _users_own(live, Path(adapter).expanduser(), own, work / "given", target)
        else:
            given = _Given(_made(live, adapter, seed, request))
        if given.stock is None or is_untrained(given.model):
            give_effect(given.model, prefixes, expected, seed=seed)
            given = _Given(given.model)
        found, sites = _served(given, bench, work, as_is, report)
    return Proof(
        model=model,
        on_twin=own is None,
        adapter=None if adapter is None else str(adapter),
        target=target,
        converted=not as_is,
        served=found,
        sites=sites,
    )


@dataclass(frozen=True)
class _Given:
    """The adapter that is proven.

    Attributes:
        model: its base with it.
        stock: the user's own files, as PEFT loads them; None where they are to be written from the model.
        form: the user's own files, where they are in the engine's form already.
    """

    model: PeftModel
    stock: Path | None = None
    form: Path | None = None


def _served(
    given: _Given, bench: Bench, work: Path, as_is: bool, report: Callable[[Progress], None]
) -> tuple[Served, Mapping[str, Served]]:
    """Serve the adapter, and where it is not applied each site's part of it."""
    adapted = given.model
    stock = given.stock or save_stock(adapted, work / "adapter")
    form = given.form or in_form_of(bench.engine, stock, bench.base, work / "form", as_is=as_is)
    case = Case(form, log_probabilities(adapted, bench.prefixes))
    found = bench.serve({"adapter": case}, on_progress=report)["adapter"]
    if found.outcome not in _IN_PART:
        return found, {}
    report(Progress("looking for what is wrong", 0, None))
    factor = None if found.outcome is Outcome.IGNORED else scaled_by(adapted, bench, form)
    if factor is not None:
        return replace(found, outcome=Outcome.SCALED, factor=factor), {}
    sites = by_site(adapted, bench, work / "sites", as_is=as_is, on_progress=report)
    return replace(found, site=first_not_applied(sites)), sites


def weights_folder(model: str) -> Path | None:
    """Return the folder that ``model`` names if it holds weights."""
    folder = existing_path(model)
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def load_in_float32(folder: Path) -> PreTrainedModel:
    """Load a folder to be computed in float32, as the engines load it."""
    import torch

    return load_model(str(folder), dtype=torch.float32)


def _users_own(live: PreTrainedModel, adapter: Path, base: Path, work: Path, target: str) -> _Given:
    """Load an adapter on its own base; one that was converted is converted back for PEFT, and served as it is."""
    stock, form = as_peft(adapter, base, work)
    return _Given(with_adapter(live, stock), stock, adapter if form == target else None)


def _made(live: PreTrainedModel, adapter: str | Path | None, seed: int, request: Mapping[str, Any]) -> PeftModel:
    """Put an adapter of another model on this one by its configuration, or a fresh one by the request."""
    if adapter is None:
        planned = plan(live, **{"r": _RANK, **request})
        with seeding(live, seed):
            return attach(live, planned)
    stored = read_adapter(Path(adapter).expanduser())
    with seeding(live, seed):
        return attach_stock(live, {**stored.config, "inference_mode": False})


def with_adapter(live: PreTrainedModel, adapter: str | Path) -> PeftModel:
    """Load a saved adapter on its base, as stock PEFT does; a pickle is refused.

    Raises:
        AdapterError: it cannot be read, or does not fit this base (``adapter-misfit``).
    """
    folder = read_adapter(Path(adapter).expanduser()).folder
    try:
        return load(live, folder)
    except (RuntimeError, ValueError, KeyError) as error:
        raise AdapterError(
            "PEFT cannot load this adapter on this base",
            where=str(folder),
            why=first_line(error),
            help=f"graft check {folder} --base MODEL says what does not fit",
            code="adapter-misfit",
        ) from error
