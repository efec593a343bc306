"""Paired differences and their intervals, against SciPy; and words that say what was trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from run_folders import groups_in, outcome, plain, synthetic_run, two_groups, write

from saltflat.lab.report.differences import between, difference_tables
from saltflat.lab.report.statistics import Spread
from saltflat.lab.report.student import two_sided
from saltflat.lab.report.terms import claimed, shown
from saltflat.lab.report.trained import trained_table
from saltflat.lab.report.words import headline


@given(st.integers(1, 1000), st.floats(0.01, 0.9999))
def test_student_s_t_is_scipy_s(freedom: int, share: float) -> None:
    assert two_sided(freedom, share) == pytest.approx(scipy.stats.t.ppf((1 + share) / 2, freedom), rel=1e-9)


def test_without_a_degree_of_freedom_there_is_no_t() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        two_sided(0)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_interval_of_a_mean_is_scipy_s(values: list[float]) -> None:
    low, high = Spread(dict(enumerate(values))).interval
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    if error == 0:
        assert low == high == pytest.approx(np.mean(values))
        return
    expected = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
    assert (low, high) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_one_value_has_no_interval() -> None:
    assert np.isnan(Spread({3: 1.0}).interval).all()
    assert between(Spread({3: 1.0}).interval) == ""


def test_every_group_is_compared_with_the_first_at_the_seeds_that_both_have(tmp_path: Path) -> None:
    first, second = [20.0, 21.5, 17.25, 90.0], [10.0, 12.0, 11.0]
    folders = two_groups(tmp_path, first, second)
    folders.append(synthetic_run(tmp_path / "trades", recipe="trades", seed=1, gap=25.0))
    epochs, _ = difference_tables(groups_in(folders))
    assert [(body.name, body.detail) for body in epochs.bodies] == [("at-awp", "− at"), ("trades", "− at")]
    last = epochs.bodies[0].rows[1]
    gap = last.cells[[column.text for column in epochs.columns].index("gap")]
    differences = [b - a for a, b in zip(first, second, strict=False)]
    low, high = scipy.stats.ttest_1samp(differences, 0).confidence_interval()
    assert last.cells[0].mean == "3"
    assert gap.mean == f"−{-np.mean(differences):.2f}"
    assert gap.spread == between((low, high))
    assert gap.detail == "n = 3; seed 0: −10.00, seed 1: −9.50, seed 2: −6.25"
    alone = epochs.bodies[1].rows[1]
    assert (alone.cells[0].mean, alone.cells[4].mean, alone.cells[4].spread) == ("1", "+3.50", "")
    assert "2 recipes are compared with one" in epochs.caption


def test_an_unfinished_run_is_not_compared(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20, 20], [10, 10, 10])
    path = folders[5] / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    epochs, outcomes = difference_tables(groups_in(folders))
    assert {row.cells[0].mean for table in (epochs, outcomes) for row in table.bodies[0].rows} == {"2"}


def test_differences_under_attack_are_those_of_one_place_and_one_attack(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [10, 10], robust=45.0)
    for folder, robust in zip(folders[2:], (46.0, 48.0), strict=True):
        write(folder / "outcomes" / "last.json", outcome("last", robust))
        write(folder / "outcomes" / "best.json", outcome("best", robust) | {"n": 100})
    _, table = difference_tables(groups_in(folders))
    (row,) = table.bodies[0].rows  # the best weights were attacked on other images
    assert (row.label, row.cells[1].mean) == ("last", "2000 test")
    assert [cell.mean for cell in row.cells[2:]] == ["+2.00"] * 4
    low, high = scipy.stats.ttest_1samp([1.0, 3.0], 0).confidence_interval()
    assert row.cells[2].spread == between((low, high))


def test_groups_without_a_seed_in_common_show_no_number(tmp_path: Path) -> None:
    folders = [synthetic_run(tmp_path / str(seed), recipe=recipe, seed=seed) for seed, recipe in enumerate("ab")]
    epochs, outcomes = difference_tables(groups_in(folders))
    for table in (epochs, outcomes):
        for row in table.bodies[0].rows:
            assert row.cells[0].mean == "0"
            assert {cell.mean for cell in row.cells[2:]} <= {"–", ""}


def test_one_group_is_compared_with_nothing(tmp_path: Path) -> None:
    assert difference_tables(groups_in(two_groups(tmp_path, [20, 21], []))) == []


def test_numbers_of_sentences_have_definitions_and_no_letter_is_lost(tmp_path: Path) -> None:
    for sentence in headline(groups_in(two_groups(tmp_path, [20, 21, 23], [10, 11, 12]))):
        for text, parts in ((sentence.claim, claimed(sentence.claim)), (sentence.evidence, shown(sentence.evidence))):
            assert "".join(part for part, _ in parts) == text
            assert any(key for _, key in parts)
            assert all(plain(part)[-1] in "s%" for part, key in parts if key)


@given(st.text())
def test_any_sentence_keeps_its_letters(sentence: str) -> None:
    assert "".join(part for part, _ in claimed(sentence)) == sentence


def test_what_was_trained_is_said_in_a_row_for_each_recipe(tmp_path: Path) -> None:
    awp = {"awp": {"method": "awp", "gamma": 0.005}, "objective": {"name": "trades", "beta": 6.0}}
    natural = {"objective": {"name": "natural"}, "model": {"name": "wide-resnet", "depth": 28, "widen_factor": 10}}
    free = {"attack": {"norm": "Linf", "eps": "8/255", "replays": 4, "steps": 1}}
    folders = [synthetic_run(tmp_path / "awp" / str(seed), recipe="awp", seed=seed, config=awp) for seed in (0, 2)]
    folders += [synthetic_run(tmp_path / "natural", recipe="natural", config=natural)]
    folders += [synthetic_run(tmp_path / "free", recipe="free", config=free)]
    rows = [[cell.mean for cell in body.rows[0].cells] for body in trained_table(groups_in(folders)).bodies]
    assert {row.pop(0) for row in rows} == {"digits, 1000 images"}
    assert rows == [
        ["small-cnn, width 24", "trades, β 6.0", "10 steps, Linf, eps 8/255", "awp, γ 0.005", "6 of 6", "0, 2"],
        ["wide-resnet-28-10", "natural", "none", "none", "6 of 6", "0"],
        ["small-cnn, width 24", "at", "free, 4 replays, Linf, eps 8/255", "none", "6 of 6", "0"],
    ]


def test_a_config_that_says_nothing_is_no_fault(tmp_path: Path) -> None:
    (group,) = groups_in([synthetic_run(tmp_path / "run")])
    bare = replace(group, runs=(replace(group.runs[0], config={}),))
    assert [cell.mean for cell in trained_table([bare]).bodies[0].rows[0].cells][:3] == ["–", "–", "–"]
