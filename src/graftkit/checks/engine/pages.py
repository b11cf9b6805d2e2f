"""The rules' pages, generated from the rules.

``python -m graftkit.checks.engine.pages FOLDER`` writes them; ``--check`` reports those that are out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from graftkit.checks.engine.rule import Rule
from graftkit.checks.rules import all_rules
from graftkit.files import write_text

_GENERATED = "<!-- Generated from the rule by graftkit.checks.engine.pages: edit the rule, then `make docs`. -->"
# Of the index; ``graft rules`` has the same.
COLUMNS = ("code", "severity", "what must be true")


def page(rule: Rule) -> str:
    """Return a rule's page as Markdown."""
    sections = (
        ("What it checks", f"{rule.title[0].upper()}{rule.title[1:]}."),
        ("Why it matters", rule.why),
        ("Example", rule.example),
        ("What to do", f"{rule.help[0].upper()}{rule.help[1:]}."),
        ("How safe that is", rule.safety),
        ("Needs", ", ".join(rule.needs) + '. Without them the verdict is "unknown".'),
        *((("Settings", _settings(rule)),) if rule.settings else ()),
        ("Since", f"graftkit {rule.since}"),
        ("Sources", "\n".join(f"- {source}" for source in rule.sources)),
    )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    return f"{_GENERATED}\n\n# {rule.code}: {rule.title}\n\nSeverity: {rule.severity}\n\n{body}\n"


def _settings(rule: Rule) -> str:
    head = f"`[tool.graftkit.rules.{rule.code}]` of pyproject.toml, or `checks: rules: {rule.code}:` of a recipe:"
    lines = [f"- `{name}` ({setting.default}): {setting.meaning}" for name, setting in rule.settings.items()]
    return "\n".join((head, "", *lines))


def pages() -> dict[str, str]:
    """Return file name -> text of every page and of the index."""
    rules = all_rules()
    rows = "\n".join(f"| [{r.code}]({r.code}.md) | {r.severity} | {r.title} |" for r in rules)
    index = f"{_GENERATED}\n\n# Rules\n\n| {' | '.join(COLUMNS)} |\n|---|---|---|\n{rows}\n"
    return {"README.md": index, **{f"{rule.code}.md": page(rule) for rule in rules}}


def stale(folder: Path) -> list[str]:
    """Return the names of pages in ``folder`` that are missing, out of date, or of no rule."""
    wanted = pages()
    present = {path.name for path in folder.glob("*.md")} if folder.is_dir() else set()
    differing = {
        name for name in wanted if name not in present or (folder / name).read_text("utf-8") != wanted[name]
    }
    return sorted(differing | (present - wanted.keys()))


def main(arguments: list[str]) -> int:
    """Write the pages, or with ``--check`` report the stale ones and return 1."""
    folder = Path(next(a for a in arguments if not a.startswith("-")))
    if "--check" in arguments:
        behind = stale(folder)
        if behind:
            sys.stderr.write(f"stale pages in {folder}: {', '.join(behind)}; run `make docs`\n")
        return int(bool(behind))
    for name, text in pages().items():
        write_text(folder / name, text)
    for name in stale(folder):
        (folder / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
