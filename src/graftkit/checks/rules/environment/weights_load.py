"""The base's files must hold every weight of its class, under a name that the class loads.

## Why it matters

A weight that no file has is drawn at random. transformers says so in a warning and goes on: the adapter is trained
on, or merged into, another model than the one that was downloaded.

## Example

A Gemma 4 checkpoint has `q_proj.weight` where the class has `q_proj.linear.weight`, because another library wrote
it, or because its wrappers were taken away before it was saved: the 34 tensors of its towers load as noise.

Two absences are warnings. A head for another task that is absent as a whole is new, and is to be trained. Saved
buffers keep the value of the class: without its clip bounds a tower clamps nothing.

## How safe that is

`graft rekey` changes names alone, and writes a copy. Where bounds are missing, it cannot bring them back: only the
original files have them.

## Sources

- https://github.com/huggingface/transformers/issues/45388
- transformers: PreTrainedModel.from_pretrained, its loading info
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity, Source
from graftkit.surveying.checkpoint.complete import how_to_complete, why_incomplete
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    files = context.base_files
    if files.undecided is not None:
        return unknown(f"the files were not compared with the class: {files.undecided}")
    absent = files.absent
    figures: dict[str, Any] = {
        "tensors": files.tensors,
        "missing": len(absent.weights),
        "missing_heads": len(absent.heads),
        "missing_buffers": len(absent.buffers),
        "mismatched": len(files.mismatched),
        "renamed": len(files.renamed),
    }
    if absent.weights or files.mismatched:
        message = why_incomplete(absent, files.mismatched, files.renamed)
        where = (*absent.weights, *files.mismatched)[0]
        return failed(message, where=where, help=how_to_complete("BASE", files.renamed), **figures)
    if absent.heads:
        message = f"{len(absent.heads)} weights of a head are new, and random: {some(absent.heads)}"
        advice = "train them with the adapter (modules_to_save), or name the class that the files were saved from"
        return failed(message, where=absent.heads[0], help=advice, severity=Severity.WARNING, **figures)
    if absent.buffers:
        message = f"{len(absent.buffers)} buffers keep the value of the class: {some(absent.buffers)}"
        advice = "take them from the original's files: only those have their values"
        return failed(message, where=absent.buffers[0], help=advice, severity=Severity.WARNING, **figures)
    return passed(f"all weights of the class are among the {files.tensors} tensors of the files", **figures)


RULE = Rule(
    code="GK003",
    title="the base's files hold every weight of its class",
    severity=Severity.ERROR,
    needs=("base_files",),
    check=_check,
    help="fetch the model again, or save it again from where it is whole",
    since="0.1.0",
    source=Source.FILE,
)
