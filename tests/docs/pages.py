"""The blocks of a page, and what the page says of them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Generated from rules and from the reports of others' faults: each has its own tests.
_ELSEWHERE = ("docs/rules/", "docs/upstream/", "docs/serving-table.md")

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.DOTALL | re.MULTILINE
)
_TITLE = re.compile(r'title="([^"]+)"')
# The sentence that a reader sees, and that says what stands in for what.
_SENTENCE = re.compile(
    r"Tests run (?:every block of this page|it) as it is"
    r"(?:, with (?P<stand_ins>[^.]*(?:\.\S[^.]*)*))?\.(?=\s|\*|$)"
)
_STAND_IN = re.compile(r"(?P<what>[^`]+?(?:(?:of|for) `[^`]+`)?) as `(?P<name>[^`]+)`(?:, (?:and )?| and |$)")
_NOT_RUN = re.compile(r"Not run: ")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: the first word after the fence.
        title: the file that it is, where it is one.
        body: its lines, without the indentation of the fence.
        line: the page's line of its first line, from 1.
    """

    language: str
    title: str | None
    body: str
    line: int


@dataclass(frozen=True)
class StandIn:
    """What tests put in the place of what a reader has: ``a twin of `qwen3``` as ``Qwen/Qwen3-0.6B``."""

    what: str
    name: str


@dataclass(frozen=True)
class Page:
    """A page of the documentation.

    Attributes:
        path: relative to the repository.
    """

    path: str
    text: str

    @classmethod
    def read(cls, path: str) -> Page:
        return cls(path, (ROOT / path).read_text(encoding="utf-8"))

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(self._blocks())

    def _blocks(self) -> Iterator[Block]:
        for found in _FENCE.finditer(self.text):
            language, _, rest = found["info"].strip().partition(" ")
            title = _TITLE.search(rest)
            line = self.text.count("\n", 0, found.start("body")) + 1
            yield Block(language, title[1] if title else None, textwrap.dedent(found["body"]), line)

    @property
    def has_what_is_not_run(self) -> bool:
        """Whether a block needs what is not here, or is a Python file that no other block names."""
        others = "".join(
            block.body for block in self.blocks if block.language in ("python", "sh") and not block.title
        )
        files = [Path(block.title).stem for block in self.blocks if block.language == "python" and block.title]
        return any(block.language == "bash" for block in self.blocks) or any(name not in others for name in files)

    @property
    def says_what_runs(self) -> bool:
        return _SENTENCE.search(self._plain) is not None

    @property
    def says_what_does_not(self) -> bool:
        return _NOT_RUN.search(self._plain) is not None

    @property
    def stand_ins(self) -> tuple[StandIn, ...]:
        """What the page's sentence lists; an item that cannot be read is an error."""
        sentence = _SENTENCE.search(self._plain)
        rest = (sentence["stand_ins"] or "") if sentence else ""
        listed = []
        while rest:
            item = _STAND_IN.match(rest)
            assert item, f"{self.path}: not an item of the form «what as `name`»: {rest}"
            listed.append(StandIn(item["what"].strip(), item["name"]))
            rest = rest[item.end() :]
        return tuple(listed)

    @property
    def _plain(self) -> str:
        """The text, without line breaks and without what begins the lines of a quotation or a comment."""
        return " ".join(re.sub(r"^[>#] ", "", self.text, flags=re.MULTILINE).split())


def all_pages() -> tuple[Page, ...]:
    """Return the README and every page that a person wrote."""
    paths = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")))]
    return tuple(Page.read(path) for path in paths if not path.startswith(_ELSEWHERE))
