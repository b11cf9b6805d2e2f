"""``graft rules``: what a rule means and how to fix what it finds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftkit.cli.options import FormatOption, JsonOption
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.errors import GraftError
from graftkit.text import suggest, table


def rules(
    code: Annotated[str | None, typer.Argument(metavar="[CODE]", help="A rule's code, such as GK601.")] = None,
    output_format: FormatOption = Format.HUMAN,
    json: JsonOption = False,
) -> None:
    """List the rules, or show one rule's page."""
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.checks.engine.pages import COLUMNS, page
        from graftkit.checks.rules import all_rules

        known = {rule.code: rule for rule in all_rules()}
        if code is None:
            rows = [(rule.code, rule.severity, rule.title) for rule in known.values()]
            fields = {"rules": [_fields(rule) for rule in known.values()]}
            output.result(fields, human=lambda: table(COLUMNS, rows))
            return
        rule = known.get(code.upper())
        if rule is None:
            raise _no_such_rule(code, list(known))
        output.result(_fields(rule), human=lambda: page(rule).partition("-->")[2].strip())


def _fields(rule: Any) -> dict[str, Any]:
    return {
        "code": rule.code,
        "title": rule.title,
        "severity": str(rule.severity),
        "why": rule.why,
        "example": rule.example,
        "help": rule.help,
        "safety": rule.safety,
        "needs": list(rule.needs),
        "settings": {name: {"default": s.default, "meaning": s.meaning} for name, s in rule.settings.items()},
        "since": rule.since,
        "sources": list(rule.sources),
        "url": rule.url,
    }


def _no_such_rule(code: str, known: list[str]) -> GraftError:
    return GraftError(
        f"there is no rule {code!r}",
        where="CODE",
        why=f"there are {len(known)} rules, from {known[0]} to {known[-1]}",
        help=" ".join(filter(None, [suggest(code.upper(), known), "graft rules lists them"])),
        code="rule-unknown",
    )
