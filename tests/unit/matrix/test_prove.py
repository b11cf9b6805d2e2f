"""The proof of one family with one method: what holds is proven, what is broken is not, and nothing is lost."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from graftkit.checks.rules.training import cache_agrees
from graftkit.matrix import prove as proving
from graftkit.matrix.cell import PROOF, Cell, Check, Verdict
from graftkit.matrix.prove import prove, prove_method
from graftkit.matrix.trials.methods import matrix_method, matrix_methods
from graftkit.matrix.trials.subject import Subject, prepare

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT's, on methods; the outcome is what is asserted


@pytest.fixture(scope="module")
def llama() -> Subject:
    return prepare("llama")


def verdicts(cells: tuple[Cell, ...]) -> dict[Check, Verdict]:
    return {cell.check: cell.verdict for cell in cells}


def test_a_family_that_works_is_proven_in_every_check(llama: Subject) -> None:
    found = prove_method(llama, "lora")
    assert verdicts(found) == dict.fromkeys(Check, Verdict.PROVEN)
    assert all(cell.model_class == "LlamaForCausalLM" and cell.modalities == ("text",) for cell in found)


def test_methods_leave_the_twin_as_it_was(llama: Subject) -> None:
    assert llama.twin is not None
    before = {name: tensor.clone() for name, tensor in llama.twin.state_dict().items()}
    for method in ("pissa", "ln_tuning"):
        prove_method(llama, method, [Check.MERGE])
    after = llama.twin.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_the_same_seed_gives_the_same_figures_and_the_random_state_stays(llama: Subject) -> None:
    state = torch.get_rng_state()
    one, two = (prove_method(llama, "lora", [Check.MERGE])[0].evidence for _ in range(2))
    assert one == two
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_initializers_that_move_the_base_are_compared_with_the_original(llama: Subject, method: str) -> None:
    found = verdicts(prove_method(llama, method, [Check.ATTACH, Check.RELOAD]))
    assert found == {Check.ATTACH: Verdict.PROVEN, Check.RELOAD: Verdict.PROVEN}


def test_a_base_that_was_moved_wrongly_is_found(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    init = peft.tuners.lora.Linear.pissa_init

    def half(self: Any, *args: Any) -> None:
        weight = self.get_base_layer().weight.data.clone()
        init(self, *args)
        self.get_base_layer().weight.data = weight

    monkeypatch.setattr(peft.tuners.lora.Linear, "pissa_init", half)
    (found,) = prove_method(llama, "pissa", [Check.ATTACH])
    assert (found.verdict, found.codes) == (Verdict.FAILED, ("GK115",))


def test_a_merge_that_does_nothing_is_found(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda self, _: torch.zeros(()))
    (found,) = prove_method(llama, "lora", [Check.MERGE])
    assert found.verdict is Verdict.FAILED
    assert "GK601" in found.codes


def test_an_adapter_that_is_read_wrongly_by_the_cache_is_found(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_agrees, "_one_step", lambda *_: (0.0, 1.0))
    (found,) = prove_method(llama, "lora", [Check.CACHE])
    assert (found.verdict, found.codes) == (Verdict.FAILED, ("GK201",))


def test_an_error_that_nobody_foresaw_fails_the_check_and_says_what_it_was(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(proving, "attach", broken)
    found = {cell.check: cell for cell in prove_method(llama, "lora", PROOF)}
    attach = found[Check.ATTACH]
    assert (attach.verdict, attach.codes) == (Verdict.FAILED, ("unexpected",))
    assert attach.evidence["error"] == "RuntimeError"
    assert found[Check.PLAN].verdict is Verdict.PROVEN
    assert {found[check].verdict for check in (Check.GRADIENTS, Check.MERGE, Check.RELOAD)} == {Verdict.UNKNOWN}


def test_what_peft_refuses_on_purpose_is_refused_not_failed(llama: Subject) -> None:
    (merge,) = prove_method(llama, "lily", [Check.MERGE])
    (packed,) = prove_method(llama, "loha", [Check.FOUR_BIT])
    assert (merge.verdict, packed.verdict) == (Verdict.REFUSED, Verdict.REFUSED)


def test_a_method_that_begins_elsewhere_fails_to_begin_with_the_model(llama: Subject) -> None:
    (found,) = prove_method(llama, "fourierft", [Check.ATTACH])
    assert (found.verdict, found.codes) == (Verdict.FAILED, ("GK115",))


def test_a_method_that_cannot_adapt_experts_leaves_them_out_and_says_so() -> None:
    (found,) = prove("qwen3_moe", "dora", [Check.PLAN])
    assert found.verdict is Verdict.PROVEN
    assert found.evidence["left_out"] == ["experts"]


def test_a_family_without_linears_is_refused_and_all_that_follows() -> None:
    found = prove("resnet", checks=PROOF)
    assert verdicts(found)[Check.TWIN] is Verdict.PROVEN
    assert {(cell.verdict, cell.codes) for cell in found[1:]} == {(Verdict.REFUSED, ("plan-empty",))}


def test_checks_that_do_not_apply_say_why() -> None:
    found = verdicts(prove("vit", checks=[Check.CACHE, Check.PACKING]))
    assert found == {Check.CACHE: Verdict.NOT_APPLICABLE, Check.PACKING: Verdict.NOT_APPLICABLE}


def test_a_model_that_runs_by_its_parts_has_no_cache_nor_rows_of_text() -> None:
    found = verdicts(prove("bark", checks=[Check.GRADIENTS, Check.CACHE, Check.PACKING]))
    assert found == {
        Check.GRADIENTS: Verdict.PROVEN,
        Check.CACHE: Verdict.NOT_APPLICABLE,
        Check.PACKING: Verdict.NOT_APPLICABLE,
    }


def test_an_initializer_that_needs_a_loss_is_refused_where_there_is_none() -> None:
    (found,) = prove("audio-spectrogram-transformer", "lora_ga", [Check.ATTACH])
    assert (found.verdict, found.codes) == (Verdict.REFUSED, ("initialize-loss",))


def test_a_type_of_which_no_class_is_known_is_not_applicable() -> None:
    found = prove("aimv2_text_model", checks=[Check.TWIN, Check.PLAN])
    assert {cell.verdict for cell in found} == {Verdict.NOT_APPLICABLE}
    assert all(cell.model_class is None for cell in found)


def test_methods_are_pefts_and_loras_initializers() -> None:
    names = matrix_methods()
    assert {"lora", "dora", "rslora", "oft", "ia3", "vera", "pissa", "olora"} <= set(names)
    assert len(names) == len(set(names))
    assert all(matrix_method(name).name == name for name in names)
