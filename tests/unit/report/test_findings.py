"""One report in its five forms."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from graftkit.checks.rules import all_rules
from graftkit.cli.findings_text import findings_text
from graftkit.findings import Finding, Fix, Report, Severity
from graftkit.report.annotations import to_annotations
from graftkit.report.findings_page import findings_page
from graftkit.report.html import render_report
from graftkit.report.sarif import to_sarif

SEVERITIES = (Severity.OK, Severity.INFO, Severity.UNKNOWN, Severity.WARNING, Severity.ERROR)


def finding(severity: Severity, **fields: Any) -> Finding:
    return Finding(all_rules()[0].code, severity, "the title", f"seen {severity}", **fields)


@pytest.fixture
def report() -> Report:
    placed = finding(
        Severity.ERROR,
        where="args.packing",
        file="a folder/recipe.yaml",
        line=3,
        help="turn it off: 100 %",
        fix=Fix("recipe", {"args.packing": False}),
    )
    lacking = replace(finding(Severity.UNKNOWN), message="needs batch", evidence={"missing": ("batch",)})
    return Report((*(finding(severity, where="a.site") for severity in SEVERITIES), placed, lacking))


def test_people_read_the_worst_last(report: Report) -> None:
    text = findings_text(report, verbose=True)
    order = (Severity.OK, Severity.UNKNOWN, Severity.INFO, Severity.WARNING, Severity.ERROR)
    starts = [text.index(f"{severity} {report.findings[0].code}") for severity in order]
    assert starts == sorted(starts)
    assert "where: a folder/recipe.yaml:3 args.packing" in text
    assert "fix:   args.packing: false" in text
    assert max(map(len, text.splitlines())) <= 110


def test_what_passed_is_counted_and_not_listed(report: Report) -> None:
    quiet = findings_text(report)
    assert "seen ok" in findings_text(report, verbose=True)
    assert "seen ok" not in quiet
    assert "1 passed" in quiet.splitlines()[-1]


def test_unknowns_are_grouped_by_what_they_need() -> None:
    needs = {code: ("model",) if code < "GK105" else ("batch",) for code in (f"GK{n}" for n in range(100, 110))}
    report = Report(
        tuple(
            Finding(code, Severity.UNKNOWN, "the title", f"needs {', '.join(lacks)}", evidence={"missing": lacks})
            for code, lacks in needs.items()
        )
    )
    *groups, _, summary = findings_text(report, verbose=True).splitlines()
    assert len(groups) == 2
    assert [line.count("GK") for line in groups] == [5, 5]
    assert summary.startswith("10 unknown")
    line, _, summary = findings_text(report).splitlines()
    assert "10" in line
    assert "GK" not in line
    assert all(need in line for need in ("model", "batch"))
    assert summary.startswith("10 unknown; -v")


def test_a_report_prints_what_needs_attention(report: Report) -> None:
    *lines, tally = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["unknown:", "info", "warning", "error", "error"]
    assert tally == report.tally == "2 errors, 1 warning, 1 info, 2 unknown, 1 passed"


def test_a_report_of_no_rules_is_not_clean() -> None:
    assert Report(()).tally == findings_text(Report(())) == str(Report(())) != ""


def test_json_has_the_fields_that_scripts_rely_on(report: Report) -> None:
    fields = json.loads(json.dumps(report.to_dict()))
    contract = {"code", "severity", "title", "where", "message", "help", "url", "source", "fix"}
    assert all(contract <= f.keys() for f in fields["findings"])
    assert fields["findings"][5]["fix"] == {"file": "recipe", "set": {"args.packing": False}, "remove": []}
    assert fields["findings"][5]["line"] == 3


_TEXT: dict[str, Any] = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": {**properties, "properties": {"type": "object"}},
    }


_LEVEL = {"enum": ["none", "note", "warning", "error"]}
_LOCATION = _object(
    [],
    physicalLocation=_object(
        ["artifactLocation"],
        artifactLocation=_object(["uri"], uri={"type": "string", "pattern": "^[!-~]+$"}),
        region=_object([], startLine={"type": "integer", "minimum": 1}),
    ),
    logicalLocations={"type": "array", "items": _object([], fullyQualifiedName={"type": "string"})},
)
# The objects of SARIF 2.1.0 that a report uses, from sections 3.13 to 3.52 of the standard.
_USED = _object(
    ["version", "runs"],
    **{"$schema": {"type": "string"}},
    version={"const": "2.1.0"},
    runs={
        "type": "array",
        "items": _object(
            ["tool", "results"],
            columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
            tool=_object(
                ["driver"],
                driver=_object(
                    ["name"],
                    name={"type": "string"},
                    semanticVersion={"type": "string"},
                    rules={
                        "type": "array",
                        "uniqueItems": True,
                        "items": _object(
                            ["id"],
                            id={"type": "string"},
                            name={"type": "string"},
                            shortDescription=_TEXT,
                            fullDescription=_TEXT,
                            help=_TEXT,
                            defaultConfiguration=_object([], level=_LEVEL),
                        ),
                    },
                ),
            ),
            results={
                "type": "array",
                "items": _object(
                    ["message"],
                    ruleId={"type": "string"},
                    ruleIndex={"type": "integer", "minimum": -1},
                    kind={"enum": ["notApplicable", "pass", "fail", "review", "open", "informational"]},
                    level=_LEVEL,
                    message=_TEXT,
                    locations={"type": "array", "items": _LOCATION},
                ),
            },
        ),
    },
)


def every_rule() -> Report:
    """A report in which every rule has failed once."""
    return Report(tuple(rule.finding(rule_failed()) for rule in all_rules()))


def rule_failed() -> Any:
    from graftkit.checks.engine.rule import failed

    return failed("it failed", where="somewhere")


def test_sarif_is_what_the_standard_describes(report: Report) -> None:
    for one in (report, every_rule(), Report(())):
        log = json.loads(json.dumps(to_sarif(one)))
        jsonschema.validate(log, _USED)


@pytest.mark.skipif("SARIF_SCHEMA" not in os.environ, reason="SARIF_SCHEMA names no sarif-schema-2.1.0.json")
def test_sarif_against_the_published_schema(report: Report) -> None:
    schema = json.loads(Path(os.environ["SARIF_SCHEMA"]).read_text(encoding="utf-8"))
    for one in (report, every_rule(), Report(())):
        jsonschema.validate(json.loads(json.dumps(to_sarif(one))), schema)


def test_sarif_levels_kinds_and_places(report: Report) -> None:
    results = to_sarif(report)["runs"][0]["results"]
    seen = [(r["kind"], r["level"]) for r in results[:5]]
    expected = [("pass", "none"), ("fail", "note"), ("open", "none"), ("fail", "warning"), ("fail", "error")]
    assert seen == expected
    physical = results[5]["locations"][0]["physicalLocation"]
    assert physical == {"artifactLocation": {"uri": "a%20folder/recipe.yaml"}, "region": {"startLine": 3}}
    assert "locations" not in results[6]


def test_annotations_escape_what_commands_reserve(report: Report) -> None:
    lines = to_annotations(report).splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == ["::notice", "::warning", "::error", "::error", "::notice"]
    placed = lines[3]
    assert re.match(r"::error file=a folder/recipe\.yaml,line=3,title=GK\d{3} the title::", placed)
    assert placed.endswith("help: turn it off: 100 %25")
    assert "%0A" in placed


def test_the_page_shows_every_finding(report: Report) -> None:
    text = render_report(findings_page(report, "graft check <adapter>", "graft check"))
    assert "graft check &lt;adapter&gt;" in text
    assert text.count('class="verdict ') == len(report)
    assert "a folder/recipe.yaml:3 args.packing" in text
    assert "2 failed, 1 warning, 1 info, 2 unknown, 1 ok" in text
