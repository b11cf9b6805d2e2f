"""Rules have unique codes, complete pages, and cases in which they fail and pass."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.checks.observed import by_code, not_observed

import graftkit
from graftkit.checks.engine import pages
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.rule import Rule, Setting, failed, passed
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.engine.site import address_of_rule
from graftkit.checks.rules import all_rules, check_settings
from graftkit.errors import BuildError, RecipeError
from graftkit.findings import Severity
from graftkit.progress import Progress
from graftkit.recipes.recipe import read_recipe
from graftkit.recipes.settings import CheckSettings

RULES = all_rules()
REPOSITORY = Path(__file__).parents[4]
CASES = "".join(p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parents[1].rglob("test_*.py")))
MARKERS = re.findall(r"(?:@|marks=)pytest\.mark\.(rule_fails|rule_passes)\(([^)]*)\)", CASES)


def test_codes_are_unique_and_well_formed() -> None:
    codes = [rule.code for rule in RULES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"GK\d{3}", code) for code in codes)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_rule_is_whole(rule: Rule) -> None:
    assert rule.severity in {Severity.ERROR, Severity.WARNING, Severity.INFO}
    assert rule.needs
    assert set(rule.needs) <= set(Inputs.__dataclass_fields__)
    for text in (rule.title, rule.why, rule.example, rule.help, rule.safety, rule.since):
        assert text.strip()
    assert rule.sources


@pytest.mark.parametrize("verdict", ["rule_fails", "rule_passes"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_rule_has_a_bad_case_and_a_good_one(rule: Rule, verdict: str) -> None:
    """The marker names the rule; that such a case observes the verdict is seen to in conftest.py."""
    marked = any(name == verdict and rule.code in codes for name, codes in MARKERS)
    assert marked, f"no case has @pytest.mark.{verdict}({rule.code!r})"


def test_a_marked_case_has_to_observe_the_verdict() -> None:
    promised = [pytest.mark.rule_fails("GK000").mark, pytest.mark.rule_passes("GK000").mark]
    assert not_observed(promised) == ["rule_fails(GK000)", "rule_passes(GK000)"]
    by_code(run([_rule(lambda _: failed("bad"))], CheckContext()))
    assert not_observed(promised) == ["rule_passes(GK000)"]


def test_pages_are_up_to_date() -> None:
    folder = REPOSITORY / "docs" / "rules"
    assert pages.stale(folder) == [], "run `make docs`"


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    assert pages.main([str(tmp_path)]) == 0
    assert pages.main([str(tmp_path), "--check"]) == 0
    (tmp_path / f"{RULES[0].code}.md").write_text("old")
    (tmp_path / "GK999.md").write_text("no such rule")
    assert pages.stale(tmp_path) == sorted([f"{RULES[0].code}.md", "GK999.md"])
    assert pages.main([str(tmp_path), "--check"]) == 1


DOC = """Check something.

## Why it matters

A sentence on
two lines.

A paragraph.

## Sources

- https://example.org/a
- package: a
  function
"""


def _rule(check: object, needs: tuple[str, ...] = ()) -> Rule:
    return Rule(
        code="GK000",
        title="a rule made for this test",
        severity=Severity.WARNING,
        needs=needs,
        check=check,  # type: ignore[arg-type]
        help="do something",
        doc=DOC,
        since="0.1.0",
    )


def test_a_rule_is_described_by_the_docstring_of_its_file() -> None:
    rule = _rule(None)
    assert rule.why == "A sentence on two lines.\n\nA paragraph."
    assert rule.sources == ("https://example.org/a", "package: a function")
    assert replace(rule, check=RULES[0].check, doc=None).why == RULES[0].why != ""


def _raise(_context: CheckContext) -> None:
    raise ValueError("broken rule")


def test_a_rule_that_raises_becomes_a_finding_and_the_run_goes_on() -> None:
    report = run([_rule(_raise), _rule(lambda _: passed("fine"))], CheckContext())
    assert [f.severity for f in report] == [Severity.UNKNOWN, Severity.OK]
    assert report.findings[0].evidence == {"error": "ValueError"}
    assert not report.proven


def _import(_context: CheckContext) -> None:
    importlib.import_module("no_such_package.part")


def test_a_rule_that_misses_a_package_says_what_to_install() -> None:
    (finding,) = run([_rule(_import)], CheckContext())
    assert finding.severity is Severity.UNKNOWN
    assert finding.help == "pip install no_such_package"


def _no_batch(_context: CheckContext) -> None:
    raise BuildError("no batch is known", why="it needs pictures", help="give one", code="twin")


def test_what_a_check_needs_and_cannot_be_made_is_no_crash() -> None:
    (finding,) = run([_rule(_no_batch)], CheckContext())
    assert (finding.severity, finding.help) == (Severity.UNKNOWN, "give one")
    assert finding.evidence == {"code": "twin"}


def test_a_rule_without_its_inputs_is_unknown() -> None:
    report = run([_rule(lambda _: passed("fine"), needs=("model", "batch"))], CheckContext())
    assert report.findings[0].severity is Severity.UNKNOWN
    assert report.findings[0].evidence == {"missing": ("model", "batch")}


def test_an_input_that_a_rule_does_not_declare_is_unknown_where_it_is_missing() -> None:
    rules = [_rule(lambda context: passed(context.model)), _rule(lambda context: passed(str(context.given.model)))]
    unknown, known = run(rules, CheckContext())
    assert (unknown.severity, unknown.evidence) == (Severity.UNKNOWN, {"missing": ("model",)})
    assert known.severity is Severity.OK


def test_progress_is_reported_before_each_rule() -> None:
    steps: list[Progress] = []
    run([_rule(lambda _: passed("fine"))] * 2, CheckContext(), on_progress=steps.append)
    assert [(step.done, step.total) for step in steps] == [(0, 2), (1, 2)]
    assert all(step.step.startswith("GK000") for step in steps)


def test_a_failed_rule_has_its_own_severity_and_help() -> None:
    finding = run([_rule(lambda _: failed("bad", where="there", figure=3))], CheckContext()).findings[0]
    assert (finding.severity, finding.where, finding.help) == (Severity.WARNING, "there", "do something")
    assert finding.evidence == {"figure": 3}
    assert finding.url == address_of_rule("GK000")


def _limited() -> Rule:
    rule = _rule(lambda context: failed("bad", limit=rule.limit(context.settings, "share")))
    rule = replace(rule, settings={"share": Setting(0.1, "the largest share")})
    return rule


def test_a_setting_has_a_default_that_the_user_may_replace() -> None:
    assert run([_limited()], CheckContext()).findings[0].evidence == {"limit": 0.1}
    settings = CheckSettings(rules={"GK000": {"share": 0.5, "severity": "info"}})
    finding = run([_limited()], CheckContext(settings=settings)).findings[0]
    assert (finding.evidence, finding.severity) == ({"limit": 0.5}, Severity.INFO)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"shares": 0.5}, id="no such setting"),
        pytest.param({"share": "much"}, id="another type"),
        pytest.param({"share": True}, id="true for a number"),
        pytest.param({"severity": "fatal"}, id="no such severity"),
        pytest.param({"severity": "ok"}, id="a failure cannot be called ok"),
    ],
)
def test_an_invalid_setting_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(RecipeError) as caught:
        run([_limited()], CheckContext(settings=CheckSettings(rules={"GK000": given})))
    assert (caught.value.code, caught.value.where) == ("settings", f"rules.GK000.{next(iter(given))}")


def test_ignored_rules_do_not_run() -> None:
    assert len(run([_rule(_raise)], CheckContext(settings=CheckSettings(ignore=("GK0",))))) == 0


def test_only_rules_that_a_command_can_decide_are_run() -> None:
    rules = [_rule(_raise, ("model",)), _rule(_raise, ("base", "model")), _rule(_raise, ("base",))]
    assert [rule.needs for rule in decidable(rules, ("base", "recipe"))] == [("base",)]


@pytest.mark.parametrize("name", ["GK999", "GX", "gk1"])
def test_settings_for_what_is_no_rule_are_refused(name: str) -> None:
    for settings in (CheckSettings(select=(name,)), CheckSettings(rules={name: {}})):
        with pytest.raises(RecipeError) as caught:
            check_settings(settings)
        assert caught.value.code == "settings"
    check_settings(CheckSettings(select=("GK1",), ignore=("GK",), rules={RULES[0].code: {}}))


def test_a_setting_is_refused_though_its_rule_is_not_selected() -> None:
    settings = CheckSettings(select=("GK1",), rules={"GK202": {"no_such": 1}})
    with pytest.raises(RecipeError) as caught:
        check_settings(settings)
    assert caught.value.where == "rules.GK202.no_such"


def test_a_finding_about_a_key_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: x\nargs:\n  packing: true\n")
    rule = _rule(lambda _: failed("bad", key="args.packing"))
    finding = run([rule], CheckContext(Inputs(recipe=read_recipe(file)))).findings[0]
    assert (finding.file, finding.line, finding.where) == (str(file), 3, "args.packing")
    assert run([rule], CheckContext()).findings[0].file is None


@pytest.mark.parametrize(
    ("severity", "level", "counts"),
    [
        pytest.param(Severity.ERROR, Severity.ERROR, True, id="error at error"),
        pytest.param(Severity.WARNING, Severity.ERROR, False, id="warning at error"),
        pytest.param(Severity.WARNING, Severity.WARNING, True, id="warning at warning"),
        pytest.param(Severity.UNKNOWN, Severity.INFO, False, id="unknown never counts"),
        pytest.param(Severity.OK, Severity.INFO, False, id="ok never counts"),
    ],
)
def test_fail_levels(severity: Severity, level: Severity, counts: bool) -> None:
    finding = graftkit.Finding("GK000", severity, "t", "m")
    assert graftkit.Report((finding,)).at_or_above(level) is counts
