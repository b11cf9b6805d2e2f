"""Check that the files can be loaded without running or trusting what is in them.

## Why it matters

A pickle runs code when it is loaded, and a malformed header makes readers see different tensors.

## Example

A download stops half-way: the header describes more data than the file has. Or the folder holds
`adapter_model.bin`, a pickle, and nothing else.

## How safe that is

graftkit never loads a pickle. Converting one means loading it: do that in a sandbox.

## Sources

- https://huggingface.co/docs/safetensors/index#format
- https://docs.python.org/3/library/pickle.html
"""

from __future__ import annotations

from pathlib import Path

from graftkit.adapters.file import CONFIG_NAME, PICKLES, WEIGHTS_NAME
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.findings import Severity
from graftkit.planning.matching import LONGEST_NAME
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    if context.given.refusal is not None:
        seen = context.given.refusal
        why = f": {seen.why}" if seen.why else ""
        return failed(f"{seen.what}{why}", where=seen.where, help=seen.help, refusal=seen.code)
    strange = [name for name in context.adapter.tensors if _is_strange(name)]
    if strange:
        return failed(
            f"{len(strange)} tensors have names that no module can have: {some(strange)}", names=len(strange)
        )
    twice = (*context.adapter.repeated, *context.adapter.repeated_fields)
    if twice:
        holder = "header" if context.adapter.repeated else "configuration"
        message = f"the {holder} has {len(twice)} names twice: {some(twice)}"
        return failed(message, where=twice[0], twice=len(twice))
    links = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if _leads_out(context.folder / name)]
    if links:
        message = f"{some(links)} is a link to a file outside the adapter's folder"
        advice = "copy the file itself: its target may change, or not belong to the adapter"
        return failed(message, where=links[0], help=advice, severity=Severity.WARNING, links=len(links))
    pickles = [name for name in PICKLES if (context.folder / name).is_file()]
    if pickles:
        message = f"pickled weights beside {WEIGHTS_NAME}: {some(pickles)}"
        return failed(
            message, where=pickles[0], help="delete it: loading it can run code", severity=Severity.WARNING
        )
    return passed("safetensors with a valid header, and no pickled weights beside it")


def _is_strange(name: str) -> bool:
    tricks = not name.isprintable() or not name or any(mark in name for mark in ("/", "\\", "..", " "))
    return tricks or len(name) > LONGEST_NAME


def _leads_out(path: Path) -> bool:
    """Check whether the file is a link out of its folder, or out of its repository in the Hub's cache."""
    folder = path.parent.resolve()
    repository = folder.parent.parent if folder.parent.name == "snapshots" else folder
    return path.is_symlink() and not path.resolve().is_relative_to(repository)


RULE = Rule(
    code="GK505",
    title="the adapter's files are well-formed and safe to load",
    severity=Severity.ERROR,
    needs=("folder",),
    check=_check,
    help="download the files again from a source you trust, as safetensors",
    since="0.1.0",
)
