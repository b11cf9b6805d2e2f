"""Find out what users should not have to wait for, class by class, and write it into families/known_twins.toml."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.families import family_of
from graftkit.families._known_twins import KNOWN_TWINS, KnownTwin, known_twins, read_known_twins, to_toml
from graftkit.files import write_text
from graftkit.modeling.entry import parts_to_run
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.twins.batches.recipe import is_recipe
from graftkit.twins.batches.search import find_recipe
from graftkit.twins.description import describe_twin
from graftkit.twins.example_batch import example_batch
from graftkit.twins.reaching.find import find_patterns
from graftkit.twins.remembered import Fact, forget, recall
from graftkit.twins.source_hash import source_hash
from graftkit.twins.twin import twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def entry_for(model_type: str) -> KnownTwin:
    """Find out what is known of the class that a model type's default configuration is loaded into.

    Raises:
        GraftError: there is no such class, or no twin of it runs.
    """
    model_class = model_class_of(load_config(model_type))
    forget(model_class)
    model = twin(model_type)
    return KnownTwin(
        model_class.__name__,
        model_type,
        source_hash(model_class),
        kept=_kept(model),
        batch=_batch(model),
        unreached=_unreached(model),
    )


def _kept(model: PreTrainedModel) -> tuple[str, ...]:
    return describe_twin(model).kept


def _batch(model: PreTrainedModel) -> Mapping[str, Mapping[str, str]]:
    """Return the recipe that building the twin found, or a new one; none where a family or parts make batches."""
    family = family_of(model.config.model_type)
    if parts_to_run(model) or (family is not None and family.example_inputs is not None):
        return {}
    found = recall(Fact.BATCH, type(model))
    if found and is_recipe(found):
        return found
    with quiet_transformers():
        return find_recipe(model).recipe


def _unreached(model: PreTrainedModel) -> Mapping[str, tuple[str, ...]]:
    return find_patterns(model, example_batch(model))


def stale(path: Path, model_types: Iterable[str]) -> dict[str, str]:
    """Return the entries of these model types that were made from other sources: class name -> model type."""
    wanted = set(model_types)
    behind: dict[str, str] = {}
    for entry in read_known_twins(path).values():
        if entry.model_type in wanted:
            model_class = model_class_of(load_config(entry.model_type))
            if (model_class.__name__, source_hash(model_class)) != (entry.class_name, entry.sources):
                behind[entry.class_name] = entry.model_type
    return behind


def write(path: Path, model_types: Iterable[str]) -> list[str]:
    """Make the entries of these model types again, and leave the others; return the types that have none.

    The table is written after each one, whole, so that an interrupted run loses one entry at most. Where another
    type has made the entry of a class, that one stays.
    """
    wanted, without = list(model_types), []
    for number, model_type in enumerate(wanted, 1):
        began = time.monotonic()
        entries = {name: e for name, e in read_known_twins(path).items() if e.model_type != model_type}
        try:
            with _forgotten(path, entries):
                entry = entry_for(model_type)
        except Exception as error:  # one class must not end the run
            without.append(model_type)
            outcome = f"no entry: {type(error).__name__}: {error}".replace("\n", " ")
        else:
            owner = entries.get(entry.class_name)
            if owner is None or owner.model_type == model_type:
                write_text(path, to_toml((entries | {entry.class_name: entry}).values()))
            outcome = entry.class_name
        _tell(f"[{number}/{len(wanted)}] {model_type} {time.monotonic() - began:.1f} s: {outcome}")
    return without


@contextmanager
def _forgotten(path: Path, entries: Mapping[str, KnownTwin]) -> Iterator[None]:
    """Leave an entry out of the table while it is made, so that it is not made from itself."""
    if path.is_file():
        write_text(path, to_toml(entries.values()))
    known_twins.cache_clear()
    try:
        yield
    finally:
        known_twins.cache_clear()


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: list[str] | None = None) -> int:
    """Write the entries of the given types, of all by default; with ``--check`` report stale ones and return 1."""
    from transformers import CONFIG_MAPPING

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", help="model types, with commas; all that transformers knows by default")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where an entry is stale")
    parser.add_argument("--to", type=Path, default=KNOWN_TWINS, help="the table")
    given = parser.parse_args(arguments)
    types = given.types.split(",") if given.types else list(CONFIG_MAPPING)
    if not given.check:
        without = write(given.to, types)
        if without:
            _tell(f"no entry for {len(without)} types: {', '.join(without)}")
        return 0
    behind = stale(given.to, types)
    if behind:
        _tell(f"stale: {', '.join(behind)}; run `make families TYPES={','.join(behind.values())}`")
    return int(bool(behind))


if __name__ == "__main__":
    sys.exit(main())
