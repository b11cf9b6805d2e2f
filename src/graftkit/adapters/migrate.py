"""``migrate()``: convert adapters that other tools trained on wrapped models to the form that stock PEFT loads.

Tools work around PEFT's refusal of wrappers in one of three ways, which differ in the files they save:

- redirect (unsloth, axolotl): the adapter is on the inner linear, but the configuration names the wrapper;
- replacement (FAI-RL): an adapter layer replaces the wrapper, so the tensors name the wrapper too;
- shim: a module of the tool lies between the two, and appears in the tensors' names.

In each case the tensors fit the inner linears. Only names change here, never values. An adapter that took the
place of a wrapper that clamps may have been trained without the clamp, and then computes something else with it.
Its tensors are named as those of one that was trained with it.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from graftkit._version import SCHEMA_VERSION
from graftkit.adapters.file import CONFIG_NAME, DEFAULT_RANK, WEIGHTS_NAME, AdapterFile, read_adapter
from graftkit.adapters.placement import TensorPlacement, place_tensors
from graftkit.adapters.trained_bounds import METADATA_KEY, TrainedBounds, trained_bounds
from graftkit.attaching.redirect import ModelPaths, renamed, retargeted
from graftkit.errors import AdapterError
from graftkit.files import atomic_folder, overlap, write_text
from graftkit.planning.matching import value_at
from graftkit.surveying.checkpoint.complete import check_complete
from graftkit.surveying.checkpoint.safetensors_header import header_bytes
from graftkit.surveying.sites import ModelMap, Site
from graftkit.surveying.survey import survey

RECORD_NAME = "graftkit_migration.json"
# Other files to copy: model card, tokenizer, chat template.
_COMPANIONS = frozenset({".md", ".json", ".jinja", ".txt", ".model"})


@dataclass(frozen=True, slots=True)
class Renamed:
    """One tensor with a new name, and the reason."""

    before: str
    after: str
    why: str


@dataclass(frozen=True, slots=True)
class Rewritten:
    """One field of the configuration with a new value, and the reason."""

    field: str
    before: Any
    after: Any
    why: str


@dataclass(frozen=True)
class Migration:
    """What a migration changes.

    Attributes:
        adapter: the folder it was read from.
        out: the folder it was written to, or None.
        tensors: number of tensors in the adapter.
        config: the complete new configuration.
        bounds: whether the bounds of the base's wrappers were in place while the adapter was trained; None where
            it adapts none of them, or nothing speaks against it.
        wrappers: the paths of the wrappers whose linears it adapts.
    """

    adapter: str
    base: str
    out: Path | None
    renamed: tuple[Renamed, ...] = field(repr=False)
    rewritten: tuple[Rewritten, ...] = field(repr=False)
    tensors: int
    config: Mapping[str, Any] = field(repr=False)
    bounds: TrainedBounds | None = None
    wrappers: tuple[str, ...] = field(default=(), repr=False)

    @property
    def changed(self) -> bool:
        """Whether a name changes; if not, stock PEFT loads the adapter as it is."""
        return bool(self.renamed or self.rewritten)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "adapter": self.adapter,
            "base": self.base,
            "out": None if self.out is None else str(self.out),
            "changed": self.changed,
            "tensors": self.tensors,
            "renamed": [asdict(item) for item in self.renamed],
            "rewritten": [asdict(item) for item in self.rewritten],
            "bounds": self.bounds,
        }

    def __str__(self) -> str:
        head = f"{self.adapter} -> {self.out or 'nothing written'} (base {self.base})"
        lines = [f"{r.field}: {r.before} -> {r.after}\n  {r.why}" for r in self.rewritten]
        if self.renamed:
            first = self.renamed[0]
            count = f"{len(self.renamed)} of {self.tensors} tensors renamed"
            lines.append(f"{count}, {first.before} -> {first.after}\n  {first.why}")
        if not self.changed:
            lines.append("nothing to change: stock PEFT loads it as it is")
        if self.bounds in _NOT_AS_TRAINED:
            lines.append(f"{_BOUNDS_RULE}: {_NOT_AS_TRAINED[self.bounds]}")
        return "\n".join([head, *lines])


# The rule that says more about it: graft rules GK509.
_BOUNDS_RULE = "GK509"
_NOT_AS_TRAINED: Mapping[TrainedBounds | None, str] = {
    TrainedBounds.UNKNOWN: "the adapter stood in the place of wrappers with bounds. If it was trained without "
    "them, it computes something else on this base: state it by trained_without_clamp=True or False",
    TrainedBounds.REMOVED: "the adapter was trained without the bounds of this base's wrappers, and computes what "
    "was trained only without them: gk.unwrap(model, paths=migration.wrappers, allow_change=True)",
}


def migrate(
    adapter: str | Path | AdapterFile,
    base: Any,
    out: str | Path | None = None,
    *,
    trained_without_clamp: bool | None = None,
) -> Migration:
    """Fit an adapter's names to a base model, so that stock ``PeftModel.from_pretrained`` loads it.

    Targets become the smallest form that is exact for this base, tensors are renamed to inner paths, and patterns
    follow. Ranks are checked against the tensors. Tensor data is copied byte for byte, in its order, with the
    file's metadata, as are model card and tokenizer files; ``graftkit_migration.json`` records the changes.

    Whether the wrappers' bounds were in place in training is added to the weights' metadata where it is stated or
    in question, with a warning unless they were. ``check`` (GK509) and ``merge`` read it there.

    Args:
        adapter: an adapter folder.
        base: a ``ModelMap``, or anything ``survey`` takes.
        out: the folder to write; it may be an earlier migration, which is replaced. None: write nothing.
        trained_without_clamp: True for an adapter that was trained with the plain linears in the wrappers' places;
            such a one is served under ``gk.unwrap``, and cannot be merged. False where something clamped the sum
            of linear and adapter. None: not known, also where the linears alone were clamped.

    Raises:
        AdapterError: ``adapter-does-not-fit`` when a tensor fits no site of the base, or two tensors the same one;
            ``adapter-in-place`` when ``out`` and the adapter's folder overlap; the codes of
            ``read_adapter``.
        OutputError: ``out`` cannot be written.
        SourceError, BuildError: the base cannot be surveyed, or its files lack weights (``weights-incomplete``).
    """
    file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
    target = None if out is None else _check_apart(file.folder, Path(out))
    model_map = base if isinstance(base, ModelMap) else survey(base)
    check_complete(model_map.checkpoint, model_map.model.name)
    placements = place_tensors(file, model_map)
    config = _fitted_config(file, model_map, placements)
    by_module = {e.module: e.name_in_file for e in placements if e.module is not None}
    carrying = tuple((name, model_map.by_path[module]) for module, name in by_module.items())
    result = Migration(
        adapter=str(file.folder),
        base=model_map.model.name,
        out=target,
        renamed=tuple(Renamed(e.name, e.new_name, e.why) for e in placements if e.name != e.new_name),
        rewritten=_differences(file.config, config),
        tensors=len(placements),
        config=config,
        bounds=_bounds(file, carrying, trained_without_clamp),
        wrappers=tuple(site.wrapper.path for _, site in carrying if site.wrapper is not None),
    )
    if target is not None:
        _write(file, result, target)
        if result.bounds in _NOT_AS_TRAINED:
            warnings.warn(f"{_BOUNDS_RULE}: {_NOT_AS_TRAINED[result.bounds]}", stacklevel=2)
    return result


def _bounds(file: AdapterFile, carrying: Iterable[tuple[str, Site]], without: bool | None) -> TrainedBounds | None:
    known = trained_bounds(file, carrying)
    bounded = any(site.wrapper is not None and site.wrapper.bounded for _, site in carrying)
    if without is None or not bounded:
        return known
    return TrainedBounds.REMOVED if without else TrainedBounds.KEPT


def _check_apart(folder: Path, out: Path) -> Path:
    target = out.expanduser().resolve()
    if overlap(folder.resolve(), target):
        raise AdapterError(
            "an adapter cannot be migrated in place",
            where=str(out),
            why="the output and the adapter's folder overlap",
            help="name another folder",
            code="adapter-in-place",
        )
    return target


# ---- the configuration ----


def _fitted_config(
    file: AdapterFile, model_map: ModelMap, placements: tuple[TensorPlacement, ...]
) -> dict[str, Any]:
    carrying = {e.module: e for e in placements if e.module is not None}
    if not carrying or file.config.get("target_modules") is None:
        return dict(file.config)
    try:
        fitted = _fit(file, _model_paths(model_map), carrying, placements)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise AdapterError(
            f"{CONFIG_NAME} cannot be used",
            where=str(file.folder / CONFIG_NAME),
            why=f"{type(error).__name__}: {error}",
            help="compare it with one that PEFT has written",
            code="adapter-config",
        ) from error
    return {name: _plain(value) for name, value in vars(fitted).items()}


def _model_paths(model_map: ModelMap) -> ModelPaths:
    inner = {name: site.path for name, site in model_map.inner.items()}
    return ModelPaths(model_map.module_paths, inner, model_map.model.model_type)


def _fit(
    file: AdapterFile,
    model_paths: ModelPaths,
    carrying: Mapping[str, TensorPlacement],
    placements: Iterable[TensorPlacement],
) -> SimpleNamespace:
    from peft.tuners.tuners_utils import check_target_module_exists as matches

    given = SimpleNamespace(**file.config)
    if not isinstance(given.target_modules, str) and not all(isinstance(t, str) for t in given.target_modules):
        raise TypeError("target_modules must be a string or a list of strings")
    planned = [path for path in model_paths.paths if path in carrying]
    named = {path for path in model_paths.paths if matches(given, path)}
    exact = [path for path in model_paths.paths if path in named] == planned
    aimed = given if exact else retargeted(given, planned, model_paths, matches)
    name_in_file = {path: _tool_name(path, carrying[path], model_paths, named) for path in planned}
    readings = (renamed(aimed, name_in_file), aimed)
    ranks = {e.module: e.rank for e in placements if e.module is not None and e.rank is not None}
    for reading in readings:
        if all(_rank(reading, path) == rank for path, rank in ranks.items()):
            return reading
    return _with_ranks(readings[0], ranks)


def _tool_name(path: str, placement: TensorPlacement, model_paths: ModelPaths, named: set[str]) -> str:
    """Return the site's name in the tool that trained the adapter."""
    if placement.name_in_file != path:
        return placement.name_in_file
    if path in named:
        return path
    return next((name for name, inner in model_paths.inner.items() if inner == path and name in named), path)


def _rank(config: Any, path: str) -> Any:
    return value_at(getattr(config, "rank_pattern", None), path, getattr(config, "r", DEFAULT_RANK))


def _with_ranks(config: SimpleNamespace, ranks: Mapping[str, int]) -> SimpleNamespace:
    """Spell out every rank, where no reading of the pattern explains the tensors."""
    default = getattr(config, "r", DEFAULT_RANK)
    config.rank_pattern = {re.escape(path): rank for path, rank in ranks.items() if rank != default}
    return config


_WHY = {
    "target_modules": "names exactly the modules that the tensors belong to, by their names in the base",
    "rank_pattern": "its keys name the adapted modules, with the ranks of the tensors",
    "feedforward_modules": "follows target_modules",
    "layers_to_transform": "target_modules names the layers",
    "layers_pattern": "target_modules names the layers",
    "exclude_modules": "target_modules is exact, and this would exclude modules that the adapter has",
}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Rewritten, ...]:
    return tuple(
        Rewritten(name, before.get(name), value, _WHY.get(name, "its keys name the adapted modules"))
        for name, value in after.items()
        if before.get(name) != value
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else value


# ---- writing ----


def _write(file: AdapterFile, result: Migration, target: Path) -> None:
    with atomic_folder(target, marker=RECORD_NAME) as beside:
        for companion in companions(file.folder):
            shutil.copyfile(companion, beside / companion.name)
        write_text(beside / CONFIG_NAME, json.dumps(dict(result.config), indent=2, sort_keys=True) + "\n")
        names = {r.before: r.after for r in result.renamed}
        _write_weights(file, names, result.bounds, beside / WEIGHTS_NAME)
        write_text(beside / RECORD_NAME, json.dumps(result.to_dict(), indent=2) + "\n")
        # Publish only what can be read back.
        read_adapter(beside)


def companions(folder: Path) -> list[Path]:
    """Return the files beside an adapter that say more of it: its model card, its tokenizer, its chat template."""
    marker = {CONFIG_NAME, RECORD_NAME}
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in _COMPANIONS and path.name not in marker
    )


def _write_weights(
    file: AdapterFile, names: Mapping[str, str], bounds: TrainedBounds | None, target: Path
) -> None:
    """Write the weights under other names, and with other metadata: a new header, then the same data."""
    stated = {} if bounds is None else {METADATA_KEY: str(bounds)}
    metadata = {**file.header.metadata, **stated}
    if not names and metadata == file.header.metadata:
        shutil.copyfile(file.weights_path, target)
        return
    header = {names.get(name, name): tensor for name, tensor in file.tensors.items()}
    data = len(file.header.raw)
    with file.weights_path.open("rb") as source, target.open("wb") as sink:
        source.seek(data)
        sink.write(header_bytes(header, metadata, data))
        shutil.copyfileobj(source, sink, 1 << 20)
