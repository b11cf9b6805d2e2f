"""A block for the model card of an adapter: what was adapted, how it was checked, how to load and serve it.

The hub's card is ``README.md``: a YAML header, of which the hub reads ``base_model``, ``library_name``, ``tags``
and ``pipeline_tag`` (https://huggingface.co/docs/hub/model-cards), and Markdown below it. What others wrote in
either stays: of the header only what is missing is added, of the text only the block between two comments is
replaced.
"""

from __future__ import annotations

import functools
import io
import math
import re
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit._version import __version__
from graftkit.adapters.file import DEFAULT_RANK, AdapterFile, read_adapter
from graftkit.adapters.placement import place_tensors
from graftkit.adapters.record import AdapterRecord, Dialect, read_record
from graftkit.checks.check import check
from graftkit.engines import Engine, engine_named
from graftkit.errors import AdapterError, GraftError
from graftkit.files import write_text
from graftkit.findings import Report, Severity
from graftkit.recipes.document import round_trip_yaml
from graftkit.surveying.sites import ModelMap
from graftkit.text import count, printable

if TYPE_CHECKING:
    import jinja2

CARD_NAME = "README.md"
_BEGIN, _END = "<!-- graftkit -->", "<!-- /graftkit -->"
_BLOCK = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_HEADER = re.compile(r"\A---\r?\n.*?^---\r?\n?", re.DOTALL | re.MULTILINE)
# The hub's name of what a model with this PEFT task type does; the others fit several.
_PIPELINES = {"CAUSAL_LM": "text-generation", "TOKEN_CLS": "token-classification"}
# PEFT's class that loads base and adapter at once, by task type. Source: peft/auto.py.
_LOADERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
# What PEFT writes for an adapter whose base has no name.
_TAG_WITHOUT_BASE = "base_model:adapter:"
# Origins of a base whose name leads others to it.
_NAMED = frozenset({"hub", "cache"})
# How a server is started with an adapter as PEFT saves it. Sources: docs.vllm.ai/en/latest/features/lora.html,
# docs.sglang.ai/advanced_features/lora.html
_SERVERS = {
    "vllm": "vllm serve {base} --enable-lora --lora-modules {name}={name}",
    "sglang": "python -m sglang.launch_server --model-path {base} --lora-paths {name}={name}",
}
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Card:
    """What the card of an adapter says.

    Attributes:
        header: field -> value, as the hub reads it from the YAML header.
        block: Markdown, between the two comments that say where it begins and ends.
    """

    header: dict[str, Any]
    block: str

    def __str__(self) -> str:
        return with_card("", self)

    def to_dict(self) -> dict[str, Any]:
        return {"header": self.header, "block": self.block}


@dataclass(frozen=True)
class _Facts:
    """What the template places. Names come from files that others wrote: they are safe in Markdown and Python.

    Attributes:
        settings: field of the configuration -> value.
        adapted: what was adapted -> how many modules, by role, or by the last part of the module's name.
        trained: tensors' elements.
        loader: PEFT's class that loads base and adapter, or None: the base or its class is not named.
        model_class: the base's class; AutoModel where it was not surveyed.
        serve: the command that serves it in the engine that it was checked for; None without an engine.
    """

    method: str
    base: str | None
    revision: str | None
    quantization: str | None
    settings: dict[str, Any]
    adapted: dict[str, int]
    trained: str
    versions: dict[str, str]
    report: Report
    with_base: bool
    loader: str | None
    model_class: str
    name: str
    serve: str | None
    graftkit: str = __version__

    @property
    def notable(self) -> list[tuple[str, str]]:
        """What is not in order, or not known: severity and a sentence."""
        worst_first = [Severity.ERROR, Severity.WARNING, Severity.UNKNOWN]
        found = self.report.by_severity
        return [(str(s), f"{f.code}: {_plain(f.message, 300)}") for s in worst_first for f in found[s]]


def card(adapter: str | Path, base: ModelMap | None = None, *, target: str | None = None) -> Card:
    """Describe a saved adapter for its model card, and check it for that.

    Args:
        adapter: a folder with an adapter in PEFT's form.
        base: the map of its base: its modules are then named by role, and the checks that need it are made.
        target: the engine that is to serve it, as ``check`` takes it: how to start it is then said as well.

    Raises:
        AdapterError: as ``read_adapter``, or ``adapter-dialect``: it is in an engine's form.
        EngineError: no such engine or version, or it reads no adapter.
    """
    file = read_adapter(adapter)
    record = _record(file.folder)
    if record is not None and record.dialect not in (None, Dialect.PEFT):
        raise AdapterError(
            "a card describes an adapter that PEFT loads",
            where=str(file.folder),
            why=f"this one is in the form of {record.dialect}",
            help=f"graft convert {file.folder} OUT --to peft",
            code="adapter-dialect",
        )
    engine = engine_named(target) if target is not None else None
    facts = _facts(file, record, base, check(file.folder, base, target=engine))
    if engine is not None:
        facts = replace(facts, serve=_command(engine, facts, _largest_rank(file.config)))
    return Card(_header(file, facts), f"{_BEGIN}\n{_template().render(facts=facts).strip()}\n{_END}")


def with_card(text: str, made: Card) -> str:
    """Return a ``README.md`` with a card in it.

    Args:
        text: of the present one; "" where there is none.

    Raises:
        GraftError: ``card-header``: the YAML between its first two lines of dashes cannot be read.
    """
    found = _HEADER.match(text)
    body = (text[found.end() :] if found else text).strip()
    header = _completed(_fields(found.group()) if found else {}, made.header)
    if _BLOCK.search(body):
        body = _BLOCK.sub(lambda _: made.block, body, count=1)
    else:
        body = f"{made.block}\n\n{body}".strip()
    return f"---\n{_written(header)}---\n\n{body}\n"


def _completed(present: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Add the fields that a header lacks, and the tags."""
    tags = present.get("tags") or []
    every = [*(tags if isinstance(tags, list) else [tags]), *made["tags"]]
    present.update({name: value for name, value in made.items() if present.get(name) in (None, "", [])})
    present["tags"] = [*dict.fromkeys(tag for tag in every if tag != _TAG_WITHOUT_BASE)]
    return present


def write_card(folder: str | Path, made: Card) -> Path:
    """Write a card into an adapter's ``README.md`` and return the file; what else it says stays.

    Raises:
        GraftError: ``card-header``. OutputError: ``output-not-writable``. The file is then as it was.
    """
    path = Path(folder).expanduser() / CARD_NAME
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return write_text(path, with_card(text, made))


def _fields(header: str) -> dict[str, Any]:
    from ruamel.yaml.error import YAMLError

    try:
        fields = round_trip_yaml().load(header.strip().strip("-"))
    except (YAMLError, ValueError) as error:
        raise _bad_header(printable(str(error))) from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise _bad_header("it is not a mapping")
    return fields


def _written(header: dict[str, Any]) -> str:
    stream = io.StringIO()
    round_trip_yaml().dump(header, stream)
    return stream.getvalue()


def _bad_header(why: str) -> GraftError:
    return GraftError(
        "the YAML header of the card cannot be read",
        where=CARD_NAME,
        why=why,
        help=f"correct it, or move {CARD_NAME} away",
        code="card-header",
    )


def _header(file: AdapterFile, facts: _Facts) -> dict[str, Any]:
    pipeline = _PIPELINES.get(str(file.config.get("task_type")))
    return {
        **({"base_model": facts.base, "base_model_relation": "adapter"} if facts.base else {}),
        "library_name": "peft",
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": [facts.method.lower(), "graftkit"],
    }


def _facts(file: AdapterFile, record: AdapterRecord | None, base: ModelMap | None, report: Report) -> _Facts:
    config, trained = file.config, record.base if record is not None else None
    settings = {name: config[name] for name in ("r", "lora_alpha", "use_rslora", "use_dora") if config.get(name)}
    surveyed = base.model.name if base is not None and base.model.origin in _NAMED else None
    name = (trained.id if trained else None) or config.get("base_model_name_or_path") or surveyed
    revision = (trained.revision if trained else None) or config.get("revision")
    in_config = config.get("base_model_name_or_path")
    return _Facts(
        method=_plain(file.peft_type),
        base=_plain(name) if name else None,
        revision=_plain(revision) if revision else None,
        quantization=_plain(trained.quantization) if trained and trained.quantization else None,
        settings={key: _plain(value) for key, value in settings.items()},
        adapted=_adapted(file, base),
        trained=count(sum(math.prod(stored.shape) for stored in file.tensors.values())),
        versions={_plain(k): _plain(v) for k, v in (record.versions if record else {}).items()},
        report=report,
        with_base=base is not None,
        loader=_LOADERS.get(str(config.get("task_type"))) if in_config else None,
        model_class=base.model.cls if base is not None else "AutoModel",
        name=_plain(file.folder.resolve().name),
        serve=None,
    )


def _command(engine: Engine, facts: _Facts, rank: int) -> str:
    """Return the command that starts a server with the adapter, or writes the adapter as the engine reads it."""
    base, name = shlex.quote(facts.base or "BASE"), shlex.quote(facts.name)
    if engine.name not in _SERVERS:
        out = shlex.quote(f"{facts.name}-{engine.name}")
        return f"graft convert {name} {out} --to {engine.dialect} --base {base}"
    limit = engine.rank_limit
    step = next((step for step in limit.steps if step >= rank), None) if limit else None
    flag = f" {limit.flag.format(step)}" if limit and step else ""
    return _SERVERS[engine.name].format(base=base, name=name) + flag


def _adapted(file: AdapterFile, base: ModelMap | None) -> dict[str, int]:
    """Count the adapted modules by tower and role, or by the last part of their name where no base tells."""
    if base is not None:
        try:
            modules = {placed.module for placed in place_tensors(file, base)}
        except AdapterError:  # the report says it, as a finding
            pass
        else:
            named = (f"{site.tower} {site.role}" for site in base if site.path in modules)
            return dict(sorted(Counter(named).items()))
    layers = {name.partition(".lora_")[0] for name in file.tensors if ".lora_" in name}
    return dict(sorted(Counter(_plain(layer.rpartition(".")[2]) for layer in layers).items()))


def _largest_rank(config: Any) -> int:
    ranks = [config.get("r") or DEFAULT_RANK, *(config.get("rank_pattern") or {}).values()]
    return max((rank for rank in ranks if isinstance(rank, int)), default=DEFAULT_RANK)


def _record(folder: Path) -> AdapterRecord | None:
    try:
        return read_record(folder)
    except AdapterError:  # the report says it, as a finding
        return None


def _plain(value: object, longest: int = _LONGEST_NAME) -> str:
    """Return text on one line that is safe inside code spans, quotes, comments and HTML."""
    text = re.sub(r"[`\"\\<>|$\n]", "", printable(str(value), longest))
    return re.sub("-(?=-)", "- ", text)


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graftkit.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown; every name from a file went through _plain
    )
    return environment.get_template("card.md.j2")
