"""``check()``: rules on a saved adapter, its base and the engine that is to serve it."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftkit.adapters.file import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, read_adapter, unreadable
from graftkit.adapters.record import read_record
from graftkit.checks.adapter_files.converted import engines_form, in_own_form, in_pefts_form
from graftkit.checks.adapter_files.saved_adapter import TensorData
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.rule import Rule
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.rules import rules_of
from graftkit.converting.base import ConvertBase, convert_base_of
from graftkit.converting.dialects import DialectFormat
from graftkit.engines import Engine, engine_named
from graftkit.errors import AdapterError, MergeError, SourceError
from graftkit.findings import Finding, Report, Source
from graftkit.recipes.settings import CheckSettings
from graftkit.surveying.checkpoint.local_weights import weights_folder
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.sources.local_processor import local_processor
from graftkit.surveying.survey import survey

# Errors that a rule reports as a finding: the folder is an adapter's, with wrong weights.
_FINDINGS = frozenset({"adapter-pickle", "adapter-weights"})
# Origins of a base whose name leads to its files.
_NAMED = frozenset({"directory", "hub", "cache"})
# The inputs that files on disk give.
_SUPPLIED = frozenset({"folder", "adapter", "base", "engine", "data"})


def check(
    adapter: str | Path | AdapterFile,
    base: Any = None,
    *,
    target: str | Engine | None = None,
    data: bool = True,
    settings: CheckSettings | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Report:
    """Check whether a saved adapter is complete, safe to load, loaded whole by its base, and served.

    An adapter that ``convert`` wrote, or that only another engine than PEFT can read, is judged in its own form:
    its names as that engine reads them (GK514), and only for that engine (GK707).

    Nothing in the folder is executed or unpickled. Weights that are missing, malformed or a pickle are findings
    (GK505), and so is a file without tensors (GK401); rules that need the weights are then "unknown".

    Args:
        adapter: an adapter folder, or one that ``read_adapter`` has read.
        base: a ``ModelMap``, or anything ``survey`` takes. None: rules that need a base are "unknown"; the name
            in the configuration is not looked up, since the adapter may be loaded on another base. Weight files
            of the base that are on this machine must load into its class (GK003).
        target: the engine that is to serve it, as "vllm" or "vllm==0.32". None: no rules on serving.
        data: read the tensors as well, one at a time; otherwise only headers.
        settings: which rules, with which limits.
        trust_remote_code: run model code that comes with the base; only an adapter in an engine's form needs it.
        revision: branch, tag or commit of a base that is a hub id.

    Returns:
        One finding a rule. Those on the adapter's record (GK510 to GK513) only where it has one.

    Raises:
        AdapterError: ``adapter-not-found`` (no such folder), ``adapter-config`` (no usable configuration), or
            ``adapter-needs-base`` (its form can only be read beside its base).
        EngineError: no such engine, or no such version.
        SourceError, BuildError: the base cannot be surveyed.
    """
    engine = engine_named(target) if isinstance(target, str) else target
    model_map = base if base is None or isinstance(base, ModelMap) else survey(base, revision=revision)
    with ExitStack() as opened:
        form = None if isinstance(adapter, AdapterFile) else engines_form(Path(adapter).expanduser())
        if form is None or isinstance(adapter, AdapterFile):
            given = _inputs(adapter, data=data)
        else:
            options = {"trust_remote_code": trust_remote_code, "revision": revision}
            known = None if model_map is None else convert_base_of(base, model_map, options)
            given = _converted_inputs(Path(adapter).expanduser(), form, known, data, opened)
        given = replace(given, engine=_reading(engine, form))
        if model_map is not None:
            given = replace(given, base=model_map, base_files=model_map.checkpoint)
            given = _with_record(given, model_map, revision)
        context = CheckContext(given, settings or CheckSettings())
        return Report(tuple(_from_file(finding) for finding in run(_rules(given), context)))


def _rules(given: Inputs) -> tuple[Rule, ...]:
    """Return the rules that these inputs call for."""
    # A live model, or one whose weights are elsewhere, has no files to judge.
    on_base = decidable(rules_of("environment"), given.names)
    readable = given.engine is not None and given.form in (None, given.engine.dialect)
    on_record = rules_of("record") if given.base is not None and has_record(given) else ()
    on_form = decidable(rules_of("converted"), given.names) if given.form is not None else ()
    return (*on_base, *rules_on_files(served=readable), *on_record, *on_form)


def _reading(engine: Engine | None, form: DialectFormat | None) -> Engine | None:
    """Return the engine as it reads an adapter in this form."""
    own = engine is not None and form is not None and engine.dialect == form.name
    return in_own_form(engine) if engine is not None and own else engine


def _converted_inputs(
    folder: Path, form: DialectFormat, base: ConvertBase | None, data: bool, opened: ExitStack
) -> Inputs:
    """Read an adapter in an engine's form. Without a base its names cannot be judged."""
    if base is None:
        if not ((folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()):
            raise AdapterError(
                f"an adapter in {form.name}'s form can only be read beside its base",
                where=str(folder),
                help=f"graft check {folder} --base MODEL",
                code="adapter-needs-base",
            )
        return replace(_inputs(folder, data=data), form=form.name)
    try:
        file, converted = opened.enter_context(in_pefts_form(folder, form, base))
    except (AdapterError, MergeError) as error:
        return Inputs(folder=folder, form=form.name, converted_refusal=error)
    return replace(_inputs(file, data=data), folder=folder, form=form.name, converted=converted)


def has_record(given: Inputs) -> bool:
    """Check whether the adapter says anything of its own training, be it unreadable."""
    return given.record is not None or given.record_refusal is not None


def rules_on_files(*, served: bool) -> tuple[Rule, ...]:
    """Return the rules that files can decide; those on serving only where ``served``."""
    areas = ("adapter", "saving", "serving") if served else ("adapter", "saving")
    every = (rule for area in areas for rule in rules_of(area))
    return tuple(r for r in every if _SUPPLIED.issuperset(r.needs) and {"folder", "adapter"} & set(r.needs))


def _from_file(finding: Finding) -> Finding:
    """Set the source to the files: no model is run here."""
    return replace(finding, source=Source.FILE) if finding.source is Source.PROBE else finding


def _with_record(given: Inputs, base: ModelMap, revision: str | None) -> Inputs:
    """Add what the adapter says of its own training, and what of the base that is compared with."""
    assert given.folder is not None
    try:
        record = read_record(given.folder)
    except AdapterError as error:
        return replace(given, record_refusal=error)
    if record is None:
        return given
    name = base.model.name
    if base.model.origin not in _NAMED:
        return replace(given, record=record)
    processor = None if record.tokenizer is None else local_processor(name, revision=revision)
    with suppress(SourceError):
        return replace(given, record=record, processor=processor, base_folder=weights_folder(name, revision))
    return replace(given, record=record, processor=processor)


def _inputs(adapter: str | Path | AdapterFile, *, data: bool) -> Inputs:
    if isinstance(adapter, AdapterFile):
        wanted = data and bool(adapter.tensors)
        refusal = unreadable(adapter) if wanted else None
        readable = TensorData(adapter) if wanted and refusal is None else None
        return Inputs(folder=adapter.folder, adapter=adapter, refusal=refusal, data=readable)
    folder = Path(adapter).expanduser()
    try:
        return _inputs(read_adapter(folder, allow_empty=True), data=data)
    except AdapterError as error:
        if error.code not in _FINDINGS:
            raise
        return Inputs(folder=folder, refusal=error)
