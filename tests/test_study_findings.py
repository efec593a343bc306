"""What is made of tables in which it is known what goes with the gap."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folders import plain
from study_tables import grid, names, with_equal_seeds

from saltflat.lab.config import BadInput
from saltflat.lab.study.findings import Estimate, Findings, Verdict, as_record, findings, verdict
from saltflat.lab.study.table import (
    GAP_ACCURACY,
    GAP_LOSS,
    NEGATIVE,
    TARGETS,
    Measure,
    Model,
    Table,
    column,
    from_record,
    read_table,
    write_table,
)
from saltflat.lab.study.table import as_record as table_record
from saltflat.lab.study.words import headline, left_out

KINDS = {"sharp": "gap", "confounded": "loss", "against": "reversed", "noise": "noise", "width": "width"}


def analysed(table: Table) -> Findings:
    return findings(table, resamples=300, permutations=199)


def said(found: Findings) -> str:
    return plain(" ".join(f"{sentence.claim} {sentence.evidence}" for sentence in headline(found)))


def verdicts(found: Findings, target: str = GAP_LOSS) -> dict[str, str]:
    return {one.measure.name: str(one.with_target(target).verdict) for one in found.measures}


def test_measures_come_out_as_they_were_made() -> None:
    found = analysed(grid(KINDS))
    expected = {
        "sharp": "supported",
        "confounded": "explained",
        "against": "contradicted",
        "noise": "none",
        "width": "supported",
    }
    assert verdicts(found) == expected
    assert verdicts(found, GAP_ACCURACY) == expected
    assert all(one.with_target(NEGATIVE).verdict is None for one in found.measures)
    sharp, confounded, _, noise, width = (one.with_target(GAP_LOSS) for one in found.measures)
    assert sharp.tau.low > 0.5
    assert width.tau.high < -0.5
    assert confounded.given_train_loss == Estimate(0, 0, 0)  # it orders models as training loss does
    assert sharp.p == 1 / 200
    assert noise.p > 0.05


@pytest.mark.parametrize(
    ("kind", "opening", "closing"),
    [
        ("gap", "Flatness goes with a small robust generalisation gap by the one measure", "The claim is supported by"),
        ("width", "Flatness goes with a small robust generalisation gap by the one measure", "supported by m."),
        ("loss", "but no measure says more about the gap than how far the model is trained", "Explained by how far"),
        ("reversed", "Flatness does not go with a small robust generalisation gap", "The claim is contradicted by m."),
        ("noise", "No association of flatness with the robust generalisation gap was found", "No association with the"),
    ],
)  # fmt: skip
def test_words_follow_the_numbers_whichever_way_they_fall(kind: str, opening: str, closing: str) -> None:
    text = said(analysed(grid({"m": kind})))
    assert opening in text
    assert closing in text
    assert "One measure was looked at." in text
    assert "48 models from 48 runs, 3 seeds, 4 methods." in text


def test_words_say_what_tau_means_and_how_many_measures_were_looked_at() -> None:
    found = analysed(grid(names(12, ["noise", "gap"])))
    text = said(found)
    assert "12 measures were looked at" in text
    assert "0.6 of these" in text
    tau = found.with_verdict(GAP_LOSS, Verdict.SUPPORTED)[0].with_target(GAP_LOSS).tau.value
    assert f"of 100 pairs of models about {round(50 * (1 + tau))} are ordered alike" in text


def test_few_runs_are_called_few() -> None:
    small = grid({"m": "gap"}, seeds=1)
    assert "16 runs are few: only |τ| of about 0.52 and more" in said(analysed(small))
    assert "are few" not in said(analysed(grid({"m": "gap"})))


def test_fewer_than_five_runs_say_nothing() -> None:
    table = grid({"m": "gap"}, checkpoints=3)
    few = analysed(replace(table, models=table.models[:12]))
    assert few.models == 12
    assert few.runs == 4
    assert verdicts(few) == {"m": "too few"}
    assert math.isnan(few.measures[0].with_target(GAP_LOSS).tau.value)
    assert "Nothing can be said" in said(few)
    for number in (0, 1):
        assert "Nothing can be said" in said(analysed(replace(table, models=table.models[:number])))
    assert "Nothing can be said" in said(analysed(replace(grid({}), measures=())))


def test_a_measure_that_is_the_same_everywhere_has_no_verdict() -> None:
    table = grid({"m": "gap", "same": "noise"})
    models = tuple(replace(model, measures=dict(model.measures) | {"same": 1.0}) for model in table.models)
    found = analysed(replace(table, models=models))
    assert verdicts(found) == verdicts(found, GAP_ACCURACY) == {"m": "supported", "same": "no difference"}
    text = said(found)
    assert "No difference among the models in same." in text
    assert "1 supported, 1 no difference among the models" in text
    assert "too few" not in text.lower()


def test_where_nothing_differs_nothing_is_said_but_why() -> None:
    table = grid({"same": "noise"})
    alike = tuple(replace(model, measures={"same": 1.0}) for model in table.models)
    rare = tuple(replace(model, measures={"same": place if place < 4 else None}) for place, model in enumerate(alike))
    for models, why in (
        (alike, "No difference among the models in same."),
        (rare, "Too few models for same."),
    ):
        text = said(analysed(replace(table, models=models)))
        assert "Nothing can be said" in text
        assert "no measure has values of 5 runs or more that differ" in text
        assert "are too few" not in text
        assert why in text


def test_a_gap_that_is_the_same_everywhere_has_no_verdict() -> None:
    table = grid({"m": "gap"})
    models = tuple(replace(model, targets=dict(model.targets) | {GAP_ACCURACY: 0.0}) for model in table.models)
    found = analysed(replace(table, models=models))
    assert verdicts(found, GAP_ACCURACY) == {"m": "no difference"}
    assert "With the gap in robust accuracy: no difference among the models." in said(found)


def test_the_rule_of_the_verdict() -> None:
    above, below, around = Estimate(0.5, 0.2, 0.7), Estimate(-0.5, -0.7, -0.2), Estimate(0.1, -0.1, 0.3)
    assert verdict(5, above, above, 1) is verdict(5, below, below, -1) is Verdict.SUPPORTED
    assert verdict(5, above, around, 1) is verdict(5, above, below, 1) is Verdict.EXPLAINED
    assert verdict(5, above, above, -1) is verdict(5, below, above, 1) is Verdict.CONTRADICTED
    assert verdict(5, around, above, 1) is Verdict.NONE
    assert verdict(5, above, Estimate(), 1) is Verdict.EXPLAINED
    assert verdict(5, Estimate(), above, 1) is Verdict.SAME
    assert verdict(5, Estimate(0.5), above, 1) is Verdict.TOO_FEW
    assert verdict(4, Estimate(), above, 1) is verdict(4, above, above, 1) is Verdict.TOO_FEW


def test_undertrained_models_are_left_out_and_shown() -> None:
    table = grid({"m": "gap"}, floor=60)
    found = analysed(table)
    accuracies = column(table.models, "controls", "train_robust_accuracy")
    assert 10 < len(found.undertrained) == (accuracies < 60).sum() < 40
    assert found.measures[0].models == found.models == (accuracies >= 60).sum()
    association = found.measures[0].with_target(GAP_LOSS)
    everyone = analysed(replace(table, floor=0)).measures[0].with_target(GAP_LOSS)
    assert association.with_undertrained == everyone.tau
    assert association.tau != everyone.tau
    assert everyone.with_undertrained == everyone.tau
    assert f"{len(found.undertrained)} undertrained models are left out" in said(found)
    assert "None" not in said(found)
    assert "No model is below 10 % training robust accuracy" in said(analysed(replace(table, floor=10)))


def test_without_a_floor_nothing_is_said_of_it() -> None:
    text = said(analysed(grid({"m": "gap"}, floor=0)))
    assert "below 0 %" not in text
    assert "left out" not in text


def test_seeds_that_are_not_on_record_are_not_counted() -> None:
    table = grid({"m": "gap"})
    text = said(analysed(replace(table, models=tuple(replace(model, axes={}) for model in table.models))))
    assert "48 models from 48 runs, 4 methods." in text
    assert "seed" not in text


def test_missing_and_infinite_values_are_dropped_measure_by_measure_and_counted() -> None:
    table = grid({"m": "gap", "n": "gap"})
    models = list(table.models)
    for place, value in enumerate((math.nan, math.inf, None)):
        models[place] = replace(models[place], measures=dict(models[place].measures) | {"m": value})
    models[3] = replace(models[3], measures={})
    models[4] = replace(models[4], targets=dict(models[4].targets) | {GAP_LOSS: None})
    found = analysed(replace(table, models=tuple(models)))
    assert found.incomplete == (models[4].name,)
    assert [(one.models, one.missing) for one in found.measures] == [(43, 4), (46, 1)]
    without = analysed(replace(table, models=tuple(models[5:])))
    m, same = found.measures[0], without.measures[0]
    assert m.with_target(GAP_LOSS).tau == same.with_target(GAP_LOSS).tau
    assert "measure by measure: m (4), n (1)" in said(found)
    assert "1 more model could not be measured" in said(found)


def test_a_training_that_failed_is_named_and_counts_for_nothing() -> None:
    table = grid({"m": "gap"})
    failed = Model("failed", "failed", "at", {"objective": "at"}, {}, {}, {}, note="training failed: out of memory")
    with_it, without = analysed(replace(table, models=(failed, *table.models))), analysed(table)
    assert with_it.incomplete == ("failed",)
    assert as_record(replace(with_it, incomplete=())) == as_record(without)
    (note,) = left_out(replace(table, models=(failed, *table.models)), with_it)
    assert (note.claim, "out of memory" in note.evidence) == ("failed", True)


def test_checkpoints_of_one_run_are_drawn_together() -> None:
    once = grid({"m": "noise"})
    copies = tuple(replace(one, name=f"{one.name} {copy}") for one in once.models for copy in range(3))
    first, thrice = (analysed(table).measures[0] for table in (once, replace(once, models=copies)))
    assert (thrice.models, thrice.runs) == (144, 48)
    for target in TARGETS:
        before, after = first.with_target(target), thrice.with_target(target)
        assert after.tau.value == pytest.approx(before.tau.value)
        assert (after.tau.low, after.tau.high) == pytest.approx((before.tau.low, before.tau.high))


def test_seeds_of_one_setting_are_drawn_together_by_setting() -> None:
    """Three seeds that come out alike are one model of each setting, whatever the interval by run makes of them."""
    once = grid({"m": "noise"}, seeds=1)
    alone, thrice = analysed(once), analysed(with_equal_seeds(once, 3))
    assert (alone.runs, alone.settings) == (16, 16)
    assert (thrice.runs, thrice.settings) == (48, 16)
    for target in TARGETS:
        one, three = (found.measures[0].with_target(target) for found in (alone, thrice))
        assert one.tau_by_setting == one.tau
        assert three.tau_by_setting.value == three.tau.value
        assert (three.tau_by_setting.low, three.tau_by_setting.high) == pytest.approx((one.tau.low, one.tau.high))
        assert three.tau.high - three.tau.low < 0.8 * (one.tau.high - one.tau.low)


def test_a_run_s_checkpoints_stay_together_by_setting_though_their_axes_differ() -> None:
    table = grid({"m": "gap"}, checkpoints=2)
    assert analysed(table).settings == 16
    first_and_last = tuple(
        model for model in table.models if model.axes["epochs"] == (2 if model.axes["seed"] == 0 else 1)
    )
    assert analysed(replace(table, models=first_and_last)).settings == 32
    assert analysed(replace(table, models=(*first_and_last, table.models[0]))).settings == 31


def test_models_without_hyper_parameters_are_settings_of_their_own() -> None:
    table = grid({"m": "gap"}, checkpoints=2)
    found = analysed(replace(table, models=tuple(replace(model, axes={}) for model in table.models)))
    assert (found.models, found.runs, found.settings) == (96, 48, 48)


def test_words_say_that_seeds_count_as_independent_and_what_settings_make_of_it() -> None:
    table = grid({"m": "gap"})
    warning = "Runs of one setting with different seeds count as independent"
    text = said(analysed(table))
    assert text.count(warning) == 1
    assert "narrow for claims about settings, of which there are 16." in text
    assert "By setting, every interval of τ with the gap in loss lies as by run" in text
    assert warning not in said(analysed(grid({"m": "gap"}, seeds=1)))
    few = analysed(replace(table, models=table.models[:12]))
    assert (few.runs, few.settings) == (12, 4)
    assert math.isnan(few.measures[0].with_target(GAP_LOSS).tau_by_setting.low)
    assert "of which there are 4. Intervals by setting need at least 5." in said(few)


def test_words_name_the_measures_whose_interval_lies_otherwise_by_setting() -> None:
    """Settings whose seeds come out alike: what is weak by setting looks certain by run."""
    once = grid({"m": "gap", "n": "noise"}, seeds=1)
    gaps = column(once.models, "targets", GAP_LOSS)
    weak = (gaps - gaps.mean()) / gaps.std() + 3 * np.random.default_rng(7).normal(size=len(gaps))
    models = tuple(replace(one, measures={**one.measures, "n": n}) for one, n in zip(once.models, weak, strict=True))
    found = analysed(with_equal_seeds(replace(once, models=models), 6))
    association = found.measures[1].with_target(GAP_LOSS)
    assert association.tau.low > 0 > association.tau_by_setting.low
    assert "By setting, the interval of τ with the gap in loss comes to lie otherwise for n." in said(found)


def test_the_noise_floor_tells_what_repeats_from_what_does_not() -> None:
    table = grid({"m": "gap", "n": "noise"})
    draws = np.random.default_rng(0)
    models = tuple(replace(one, again={"m": one.measures["m"], "n": draws.normal()}) for one in table.models[:20])
    rest = tuple(replace(one, again={}) for one in table.models[20:])
    repeats, noise = analysed(replace(table, models=models + rest)).measures
    assert (repeats.repeated, repeats.intraclass, repeats.repeated_tau) == (20, 1, 1)
    assert abs(noise.intraclass) < 0.5
    never = analysed(replace(table, models=rest)).measures[0]
    assert never.repeated == 0
    assert math.isnan(never.intraclass)


def test_axes_are_those_of_the_grid_and_methods_are_left_out_in_turn() -> None:
    association = analysed(grid({"m": "gap"})).measures[0].with_target(GAP_LOSS)
    assert [axis.name for axis in association.axes] == ["objective", "learning_rate", "examples"]
    assert [axis.pairs for axis in association.axes] == [72, 24, 24]
    assert association.psi == pytest.approx(np.mean([axis.psi for axis in association.axes]))
    assert association.without_method.keys() == {"at", "trades", "at-awp", "random-wp"}
    assert association.worst_sign_error == max(axis.sign_error(1) for axis in association.axes)


def test_controls_stand_in_a_measure_s_place() -> None:
    loss, norm = analysed(grid({"m": "gap"})).controls
    assert loss.with_target(GAP_LOSS).tau.high < 0
    assert loss.with_target(GAP_LOSS).given_train_loss == Estimate(0, 0, 0)
    assert norm.with_target(GAP_LOSS).tau.low < 0 < norm.with_target(GAP_LOSS).tau.high


def test_a_sign_is_expected_of_a_measure_and_a_gap_alone() -> None:
    found = analysed(grid({"m": "gap"}))
    for finding in (*found.measures, *found.controls):
        for one in finding.associations:
            expected = finding in found.measures and one.target != NEGATIVE
            assert (one.verdict is not None) == expected
            assert (one.worst_axis is not None) == expected
            assert math.isfinite(one.worst_sign_error) == expected
            assert one.axes  # psi needs no expected sign


def test_equal_tables_give_equal_findings_and_others_seeds_others() -> None:
    table = grid({"m": "noise"})
    record = json.dumps(as_record(analysed(table)), allow_nan=False)
    assert record == json.dumps(as_record(analysed(table)), allow_nan=False)
    other = findings(table, resamples=300, permutations=199, seed=1).measures[0].with_target(GAP_LOSS)
    assert other.tau.low != analysed(table).measures[0].with_target(GAP_LOSS).tau.low
    assert other.tau.value == analysed(table).measures[0].with_target(GAP_LOSS).tau.value


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = grid({"m": "gap", "n": "noise"})
    first = replace(table.models[0], measures={"m": math.nan, "n": 1.0}, note="odd")
    table = replace(table, models=(first, *table.models[1:]))
    write_table(table, tmp_path / "table.json")
    again = read_table(tmp_path / "table.json")
    assert again.models[0].measures == {"m": None, "n": 1.0}
    assert again.models[1:] == table.models[1:]
    assert replace(again, models=table.models) == table
    assert from_record(table_record(again)) == again
    assert "NaN" not in (tmp_path / "table.json").read_text()


def test_a_table_in_which_a_number_was_changed_is_refused(tmp_path: Path) -> None:
    path, table = tmp_path / "table.json", grid({"m": "gap"})
    write_table(replace(table, models=(replace(table.models[0], note="first"), *table.models[1:])), path)
    path.write_text(path.read_text().replace('"first"', '"fjrst"'))
    with pytest.raises(BadInput, match=r"is no table of a study .it is not what was written"):
        read_table(path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for text in ("", "[]", "{}", '{"measures": 1, "models": []}', '{"measures": [{}], "models": []}', "{"):
        path.write_text(text)
        with pytest.raises(BadInput, match="is no table of a study"):
            read_table(path)
    with pytest.raises(BadInput, match="is no table of a study"):
        read_table(tmp_path / "none.json")
    table = grid({"m": "gap"})
    with pytest.raises(ValueError, match="models: expected names that are unique"):
        replace(table, models=(*table.models, table.models[0]))
    with pytest.raises(ValueError, match="measures: expected names that are unique"):
        replace(table, measures=table.measures * 2)
    with pytest.raises(ValueError, match="measures: expected one of"):
        replace(table, measures=())
    with pytest.raises(ValueError, match="sign: expected"):
        Measure("m", "", "", 2)


def test_where_a_supported_measure_turns_it_is_said_on_how_few_pairs() -> None:
    table = grid({"m": "gap"})
    found = analysed(table)
    association = found.measures[0].with_target(GAP_LOSS)
    axes = tuple(replace(axis, psi=-1.0, pairs=2) if axis.name == "examples" else axis for axis in association.axes)
    turned = replace(association, axes=axes, worst_axis="examples", worst_sign_error=1.0)
    others = tuple(one for one in found.measures[0].associations if one.target != GAP_LOSS)
    finding = replace(found.measures[0], associations=(turned, *others))
    assert "Where that error" not in said(found)
    assert "Where that error is largest: examples (2 pairs of models)." in said(replace(found, measures=(finding,)))


def test_what_is_no_flatness_is_a_control_and_no_evidence() -> None:
    table = grid({"m": "gap", "norm": "gap"})
    m, norm = table.measures
    found = analysed(replace(table, measures=(m, replace(norm, sign=0))))
    assert [one.measure.name for one in found.measures] == ["m"]
    assert [one.measure.name for one in found.controls] == ["training robust loss", "weight norm", "norm"]
    control = found.controls[-1].with_target(GAP_LOSS)
    assert control.tau.excludes_zero(1)
    assert (control.verdict, control.worst_axis) == (None, None)
