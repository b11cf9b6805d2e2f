"""A page's blocks as steps to run, and what they printed against what the page shows."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ruamel.yaml import YAML
from tests.docs.pages import Block, Page

# Files that are written are read by a later block; others only have to be what they claim to be.
_PARSERS = {"json": json.loads, "toml": tomllib.loads, "yaml": lambda text: list(YAML(typ="safe").load_all(text))}
_RUN = ("python", "sh")
# text: what the block before it prints. bash: needs an engine or a machine that is not here, and the page says so.
LANGUAGES = frozenset({*_RUN, *_PARSERS, "text", "bash"})
_STATUS = re.compile(r"#.*\bexit status (\d+)")


@dataclass(frozen=True)
class Step:
    """What runs for one block: Python as it is, shell with the exit status of each command checked."""

    block: Block
    output: Path
    shows: tuple[Block, ...] = ()

    def to_list(self) -> list[str]:
        text = self.block.body if self.block.language == "python" else shell(self.block.body)
        # Errors then have the page's line numbers.
        return [
            self.block.language,
            "\n" * (self.block.line - 1) * (self.block.language == "python") + text,
            str(self.output),
        ]


def steps_of(page: Page, folder: Path) -> tuple[Step, ...]:
    """Write the files of a page into the folder, and return what is to be run there, in order."""
    made: list[Step] = []
    for at, block in enumerate(page.blocks):
        assert block.language in LANGUAGES, f"{page.path}:{block.line}: a block in {block.language!r}"
        if block.language in _PARSERS:
            _PARSERS[block.language](block.body)
        if block.title is not None:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.body, encoding="utf-8")
        elif block.language in _RUN:
            made.append(Step(block, folder.parent / f"output-{at}.txt"))
        elif block.language == "text" and made:
            made[-1] = replace(made[-1], shows=(*made[-1].shows, block))
    return tuple(made)


def commands(body: str) -> Iterator[tuple[str, int]]:
    """Yield each command of a shell block and the exit status that its comment names, 0 where it names none."""
    for line in body.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            said = _STATUS.search(line)
            yield line, int(said[1]) if said else 0


def shell(body: str) -> str:
    """Return a script that ends at the first command whose exit status is not the one that is expected."""
    return "".join(
        f'{{ {line}\n}}; got=$?; [ $got = {status} ] || {{ echo "exit status $got, not {status}"; exit 1; }}\n'
        for line, status in commands(body)
    )


def missing(shown: Sequence[Block], printed: str) -> list[str]:
    """Return the lines of the page that were not printed; an ellipsis stands for anything within a line."""
    text = " ".join(printed.split())
    lines = (" ".join(line.split()) for block in shown for line in block.body.splitlines())
    return [line for line in lines if not re.search(".*?".join(map(re.escape, re.split(r" ?… ?", line))), text)]
