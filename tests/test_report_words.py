"""Sentences of the report: they claim what the numbers show, and no more."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_folders import groups_in, page, plain, synthetic_run, two_groups

from saltflat.lab.report.words import headline


def sentences(folders: Sequence[Path]) -> list[str]:
    found = headline(groups_in(folders))
    return [f"{sentence.claim} {sentence.evidence}".strip() for sentence in found]


def test_words_for_a_consistently_smaller_gap(tmp_path: Path) -> None:
    gaps = [20.0, 21.0, 22.0], [10.0, 11.5, 11.0]
    gap, robust = map(plain, sentences(two_groups(tmp_path, *gaps)))
    differences = [b - a for a, b in zip(*gaps, strict=True)]
    assert gap.startswith(
        "The robust generalisation gap of at-awp is consistently smaller than that of at: 10.83 ± 0.76 points"
    )
    assert "against 21.00 ± 1.00 points" in gap
    assert (
        f"−{-statistics.mean(differences):.2f} ± {statistics.stdev(differences):.2f} points; smaller in 3 of 3" in gap
    )
    assert "agree in sign in 25 % of studies" in gap
    assert "equals that of at in all 3 common seeds" in robust
    assert "consistently" not in robust


def test_words_for_a_consistently_larger_gap(tmp_path: Path) -> None:
    gap, _ = map(plain, sentences(two_groups(tmp_path, [10, 11, 12], [20, 21, 23])))
    assert "at-awp is consistently larger than that of at" in gap
    assert "+10.33 ± 0.58 points; larger in 3 of 3" in gap
    assert "smaller" not in gap


def test_words_for_seeds_that_disagree(tmp_path: Path) -> None:
    gap, _ = map(plain, sentences(two_groups(tmp_path, [10, 11, 12], [9, 12, 11])))
    assert gap.startswith("There is no consistent difference in robust generalisation gap between at-awp and at")
    assert "smaller in 2 of 3, larger in 1 of 3" in gap
    assert "studies" not in gap


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ([9, 9], "smaller than that of at in both common seeds, which is an anecdote"),
        ([11], "larger than that of at in the one common seed, which is an anecdote"),
        ([9, 12], "The two common seeds disagree"),
        ([10], "equals that of at in the one common seed, which is an anecdote"),
    ],
)
def test_fewer_than_three_seeds_are_an_anecdote(tmp_path: Path, second: list[float], words: str) -> None:
    gap, _ = sentences(two_groups(tmp_path, [10, 10, 10], second))
    assert words in gap
    assert "anecdote" in gap
    assert "consistent" not in gap


def test_lower_and_higher_follow_the_robust_accuracy(tmp_path: Path) -> None:
    first = two_groups(tmp_path / "a", [10, 10, 10], [], robust=45.0)
    for robust, word in ((44.0, "lower"), (46.0, "higher")):
        second = two_groups(tmp_path / word, [], [10, 10, 10], robust=robust)
        _, sentence = sentences(first + second)
        assert f"The last-epoch test robust accuracy of at-awp is consistently {word} than that of at" in sentence


def test_words_and_numbers_speak_of_the_common_seeds(tmp_path: Path) -> None:
    gap, _ = map(plain, sentences(two_groups(tmp_path, [20, 21, 22, 90], [10, 11, 12])))
    assert "11.00 ± 1.00 points against 21.00 ± 1.00 points" in gap
    assert "paired over 3 common seeds" in gap


def test_groups_without_a_common_seed_are_not_compared(tmp_path: Path) -> None:
    folders = [synthetic_run(tmp_path / "a", recipe="a", seed=0), synthetic_run(tmp_path / "b", recipe="b", seed=1)]
    gap, _ = sentences(folders)
    assert gap.endswith("the two share no seed, so nothing is compared.")


def stopped(folder: Path, epoch: int, **of: Any) -> Path:
    """A run that was interrupted after that epoch."""
    metrics = synthetic_run(folder, **of) / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:epoch]))
    return folder


def test_what_has_not_finished_is_said_before_anything_is_compared(tmp_path: Path) -> None:
    both = [stopped(tmp_path / "a", 4, recipe="a"), stopped(tmp_path / "b", 4, recipe="b")]
    first, gap, _ = sentences(both)
    assert first == "Training has not reached its end: a at epoch 4 of 6, b at epoch 4 of 6."
    assert gap.startswith("The robust generalisation gap of b")

    first, _, _ = sentences([both[0], synthetic_run(tmp_path / "c", recipe="c")])
    assert first.startswith(
        "Training has not reached its end: a at epoch 4 of 6, c at epoch 6. Numbers of different epochs"
    )


def test_groups_that_end_apart_are_told_apart(tmp_path: Path) -> None:
    first, _, _ = sentences(
        [synthetic_run(tmp_path / "a", recipe="a"), synthetic_run(tmp_path / "b", recipe="b", epochs=8)]
    )
    assert first == (
        "Training ended at different epochs: a at epoch 6, b at epoch 8. "
        "Numbers of different epochs stand side by side below."
    )


@pytest.mark.parametrize("epochs", ["many", "²", "9" * 5000, -3, None, [6]])
def test_epochs_that_are_not_on_record_are_not_missed(tmp_path: Path, epochs: object) -> None:
    folder = synthetic_run(tmp_path / "a", config={"optimizer": {"epochs": epochs}})
    assert "reached its end" not in " ".join(sentences([folder]))
    assert "Stopped after" not in page([folder])


def test_one_group_is_described_and_three_are_not_compared(tmp_path: Path) -> None:
    folders = [synthetic_run(tmp_path / str(seed), recipe="at", seed=seed) for seed in range(3)]
    (alone,) = sentences(folders)
    assert plain(alone) == (
        "After 6 epochs, at has a robust generalisation gap of 20.00 ± 0.00 points "
        "and a test robust accuracy of 45.00 ± 0.00 % (3 seeds)."
    )
    others = [synthetic_run(tmp_path / recipe, recipe=recipe) for recipe in ("mart", "trades")]
    assert [("anecdote" in sentence, "than" in sentence) for sentence in sentences(folders + others)] == [
        (False, False),
        (True, False),
        (True, False),
    ]
