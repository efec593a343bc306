"""The report: numbers against the standard library, words against numbers, and a safe page that needs no network."""

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import yaml

from saltflat.lab import figures, report

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)> $x_ & _'


def synthetic_run(
    folder: Path,
    *,
    recipe: str = "at",
    seed: int = 0,
    epochs: int = 6,
    gap: float = 20.0,
    robust: float = 45.0,
    outcomes: bool = True,
    landscape: bool = True,
    config: dict[str, Any] | None = None,
) -> Path:
    """A run folder whose last epoch has exactly this gap (points) and robust test accuracy (percent)."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng([seed, len(recipe)])
    fields = {"recipe": recipe, "seed": seed, "epochs": epochs, "attack": {"ball": "linf", "radius": 8 / 255}} | (
        config or {}
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")
    write(folder / "environment.json", environment(seed))
    write(folder / "evaluation.json", {"attack": "PGD-10, L-inf, eps 8/255, step 2/255, uniform start", "mode": "eval"})
    lines = [metrics(number, epochs, gap, robust, draws) for number in range(1, epochs + 1)]
    best = max(range(epochs), key=lambda index: lines[index]["validation"]["robust_accuracy"])
    for index, line in enumerate(lines):
        line["best"] = index in (0, best)  # the first epoch always beats those before it
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if outcomes:
        write(folder / "outcomes" / "best.json", outcome("best", robust + 1))
        write(folder / "outcomes" / "last.json", outcome("last", robust))
    if landscape:
        write(folder / "landscapes" / "last.json", landscape_record(gap, draws))
    return folder


def write(path: Path, record: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def environment(seed: int) -> dict[str, Any]:
    return {
        "python": "3.12.1",
        "torch": "2.13.0",
        "numpy": "2.4.6",
        "saltflat": "0.1.0",
        "platform": "Linux",
        "processor": "a processor",
        "cores": 2,
        "threads": 2,
        "device": "cpu",
        "git": {"commit": "0123abc", "dirty": False},
        "started": f"2026-01-0{seed + 1}T12:00:00+00:00",
    }


def metrics(number: int, epochs: int, gap: float, robust: float, draws: np.random.Generator) -> dict[str, Any]:
    progress = number / epochs
    noise = 0.0 if number == epochs else draws.normal(scale=0.4)
    test = robust - 18 * math.exp(-6 * progress) * (progress < 1) + gap * 0.1 * (1 - progress) + noise
    train = test + gap * progress

    def split(n: int, accuracy: float) -> dict[str, Any]:
        return {
            "n": n,
            "clean_accuracy": (accuracy + 31) / 100,
            "clean_loss": 1.1 - accuracy / 100,
            "robust_accuracy": accuracy / 100,
            "robust_loss": 2.2 - accuracy / 60,
        }

    return {
        "epoch": number,
        "step": 40 * number,
        "learning_rate": 0.1,
        "gamma": 0.005,
        "loss": 2.0 - progress,
        "perturbed_loss": 2.1 - progress,
        "skipped": 0,
        "train": split(1000, train),
        "validation": split(500, test),
        "test": split(2000, test),
        "gap": {"accuracy": (train - test) / 100, "loss": (train - test) / 60},
        "seconds": 12.0 + draws.uniform(),
        "evaluation_seconds": 3.0,
        "best": False,
    }


def outcome(checkpoint: str, robust: float) -> dict[str, Any]:
    drops = {"clean": -31.0, "fgsm": -6.0, "pgd-20": 0.0, "cw-20": 1.5}
    attacks = [
        {
            "name": name,
            "description": f"{name}, described exactly",
            "accuracy": (robust - drop) / 100,
            "interval": [(robust - drop - 2) / 100, (robust - drop + 2) / 100],
        }
        for name, drop in drops.items()
    ]
    return {"checkpoint": checkpoint, "split": "test", "n": 2000, "attacks": attacks, "settings": {"eps": "8/255"}}


def landscape_record(curvature: float, draws: np.random.Generator, points: int = 11) -> dict[str, Any]:
    alphas = np.linspace(-1, 1, points)
    curves = [
        {
            "direction_seed": index,
            "robust_loss": list(1.4 + curvature / 10 * (1 + 0.1 * draws.normal()) * alphas**2),
            "robust_accuracy": list(0.4 - 0.1 * alphas**2),
            "clean_loss": list(0.8 + alphas**2),
        }
        for index in range(4)
    ]
    settings = {
        "direction": "random, filter-normalised",
        "attack": "PGD-10, made afresh at each alpha",
        "batch_norm": "eval mode",
    }
    return {
        "checkpoint": "last",
        "split": "test",
        "n": 500,
        "alphas": list(alphas),
        "curves": curves,
        "settings": settings,
    }


def two_groups(folder: Path, first: Sequence[float], second: Sequence[float], **options: Any) -> list[Path]:
    """Runs of `at` and `at-awp`, one per gap (points), at seeds 0, 1, 2, …"""
    return [
        synthetic_run(folder / f"{recipe}-{seed}", recipe=recipe, seed=seed, gap=gap, **options)
        for recipe, gaps in (("at", first), ("at-awp", second))
        for seed, gap in enumerate(gaps)
    ]


def sentences(folders: Sequence[Path]) -> list[str]:
    found = report.headline(report.grouped([report.read_run(folder) for folder in folders]))
    return [f"{sentence.claim} {sentence.evidence}".strip() for sentence in found]


def page(folders: Sequence[Path]) -> str:
    path = folders[0].parent / "report.html"
    report.write_report(folders, path)
    return path.read_text(encoding="utf-8")


class Parsed(HTMLParser):
    """Tags, attributes, visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data


def plain(text: str) -> str:
    return text.replace(report.UNBROKEN, " ")


# --- Groups and numbers --------------------------------------------------------------------------------------------


def test_runs_that_differ_only_in_seed_form_a_group(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 21, 22], [10, 11, 12])
    groups = report.grouped([report.read_run(folder) for folder in reversed(folders)])
    assert [group.name for group in groups] == ["at-awp", "at"]
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1, 2], [0, 1, 2]]


def test_one_recipe_with_two_values_of_a_field_is_two_groups(tmp_path: Path) -> None:
    folders = [
        synthetic_run(tmp_path / f"{gamma}-{seed}", seed=seed, config={"awp": {"gamma": gamma}, "threads": seed})
        for gamma in (0.005, 0.01)
        for seed in (0, 1)
    ]
    groups = report.grouped([report.read_run(folder) for folder in folders])
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("at (awp.gamma 0.005)", 2),
        ("at (awp.gamma 0.01)", 2),
    ]


def test_spread_is_the_sample_standard_deviation(tmp_path: Path) -> None:
    gaps = [20.0, 21.5, 17.25]
    group = report.grouped([report.read_run(f) for f in two_groups(tmp_path, gaps, [])])[0]
    spread = report.over_seeds(group.finished, report.at(report.last, lambda epoch: epoch.gap))
    assert spread.mean == pytest.approx(statistics.mean(gaps))
    assert spread.deviation == pytest.approx(statistics.stdev(gaps))
    row = report.accuracy_table([group]).bodies[0].rows[1]
    assert row.cells[5].mean == report.decimal(statistics.mean(gaps))
    assert row.cells[5].spread == f"± {statistics.stdev(gaps):.2f}"


def test_drop_and_best_come_from_the_latest_mark(tmp_path: Path) -> None:
    run = report.read_run(synthetic_run(tmp_path / "run", epochs=9))
    recorded = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    chosen = max(recorded, key=lambda line: line["validation"]["robust_accuracy"])
    assert run.best is not None
    assert run.best.number == chosen["epoch"]
    expected = 100 * (chosen["test"]["robust_accuracy"] - recorded[-1]["test"]["robust_accuracy"])
    assert report.drop(run) == pytest.approx(expected)


def test_a_gap_is_train_minus_test_and_a_loss_gap_is_test_minus_train(tmp_path: Path) -> None:
    run = report.read_run(synthetic_run(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for epoch, line in zip(run.epochs, lines, strict=True):
        assert epoch.gap == pytest.approx(100 * line["gap"]["accuracy"])
        assert epoch.loss_gap == pytest.approx(line["gap"]["loss"])


def test_one_run_shows_its_interval_and_several_their_spread(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [10])
    table = report.outcome_table(report.grouped([report.read_run(folder) for folder in folders]))
    assert table is not None
    assert [column.text for column in table.columns[2:]] == ["clean", "fgsm", "pgd-20", "cw-20"]
    assert table.bodies[0].rows[1].cells[4].spread == "± 0.00"
    assert table.bodies[1].rows[1].cells[4].spread == "[43.00, 47.00]"


def test_outcomes_of_unlike_attacks_stand_in_unlike_columns(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [])
    record = outcome("best", 40.0)
    record["attacks"][2]["description"] = "pgd-20 with half the radius"
    write(folders[0] / "outcomes" / "best.json", record)
    table = report.outcome_table(report.grouped([report.read_run(folder) for folder in folders]))
    assert table is not None
    assert [column.text for column in table.columns].count("pgd-20") == 2


# --- Words ---------------------------------------------------------------------------------------------------------


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


# --- Missing and damaged parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [None, "a: [", "just words", "seed: 0", "recipe: at", "recipe: at\nseed: yes", "recipe: [at]\nseed: 0"]
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"no run, config\.yaml") as refusal:
        report.read_run(tmp_path)
    assert "\n" not in str(refusal.value)


def test_an_empty_run_still_makes_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("recipe: at\nseed: 3\n")
    text = Parsed(page([folder])).text
    for words in (
        "No metrics.jsonl: no per-epoch measurements",
        "No environment.json",
        "No evaluation.json",
        "No final evaluation",
        "No weight loss landscape",
        "No per-epoch measurements were found",
        "No landscape was measured",
    ):
        assert words in text


def test_a_cut_last_line_is_skipped_and_said(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run", epochs=5)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-60])
    run = report.read_run(folder)
    assert [epoch.number for epoch in run.epochs] == [1, 2, 3, 4]
    text = Parsed(page([folder])).text
    assert "The last line of metrics.jsonl is cut and was skipped" in text
    assert "Stopped after epoch 4 of 5" in text


def test_an_unfinished_run_stays_out_of_the_means(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 21, 22, 23], [])
    path = folders[3] / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    groups = report.grouped([report.read_run(folder) for folder in folders])
    assert [run.seed for run in groups[0].finished] == [0, 1, 2]
    assert "21.00 ± 1.00 points" in plain(report.headline(groups)[0].claim)
    assert "Stopped after epoch 3 of 6: drawn as thin lines and left out of all means" in page(folders)


def test_damaged_parts_are_skipped_and_said(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = '{"epoch": 3, "train": null}'
    (folder / "metrics.jsonl").write_text("\n".join([*lines, lines[1]]))
    (folder / "outcomes" / "last.json").write_text('{"checkpoint": "last", "attacks": 3}')
    record = landscape_record(10, np.random.default_rng(0)) | {"alphas": [0.5, 1.0]}
    write(folder / "landscapes" / "last.json", record)
    (folder / "environment.json").write_text("[]")
    text = Parsed(page([folder])).text
    for words in (
        "Line 3 of metrics.jsonl is damaged and was skipped",
        "Epoch 2 stands twice in metrics.jsonl: the later line counts",
        "A damaged file was skipped: outcomes/last.json",
        "A damaged file was skipped: landscapes/last.json",
        "No named fields in environment.json",
    ):
        assert words in text


def test_no_validation_split_means_no_best(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    lines = [
        json.loads(line) | {"validation": None, "best": False}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "there is no best" in page([folder])


def test_a_loss_that_is_not_finite_is_said_and_drawn_around(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["test"] |= {"robust_loss": math.nan, "clean_loss": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = landscape_record(10, np.random.default_rng(0))
    record["curves"][0]["robust_loss"][0] = math.inf
    write(folder / "landscapes" / "last.json", record)
    assert "A robust loss is not finite" in page([folder])


def test_landscapes_on_other_alphas_are_left_out_and_said(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [])
    write(folders[1] / "landscapes" / "last.json", landscape_record(10, np.random.default_rng(0), points=21))
    text = Parsed(page(folders)).text
    assert "A landscape has other alphas than the first and was left out" in text
    assert "at: 1 seed × 4 directions" in text


def test_what_speaks_against_a_comparison_is_said(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20], [10])
    other = synthetic_run(tmp_path / "again", recipe="at", seed=0)
    write(folders[1] / "evaluation.json", {"attack": "FGSM", "mode": "eval"})
    write(folders[1] / "environment.json", environment(0) | {"threads": 8, "git": {"commit": "9", "dirty": True}})
    text = Parsed(page([*folders, other, folders[0]])).text
    for words in (
        "1 run of equal configuration and seed left out",
        "The epochs were measured with different attacks",
        "The runs come from different numbers of threads",
        "The runs come from different commits",
        "The working tree had uncommitted changes",
    ):
        assert words in text


# --- The page ------------------------------------------------------------------------------------------------------


def hostile_runs(folder: Path) -> list[Path]:
    """Every text that a record can carry is hostile."""
    folders = []
    for seed in (0, 1):
        one = synthetic_run(folder / str(seed), recipe=HOSTILE, seed=seed, config={HOSTILE: {HOSTILE: [HOSTILE]}})
        write(one / "environment.json", {HOSTILE: HOSTILE, "processor": HOSTILE + "\ud800\x00"})
        write(one / "evaluation.json", {"attack": HOSTILE, "mode": HOSTILE})
        attacks = [{"name": HOSTILE, "description": HOSTILE, "accuracy": 0.5, "interval": [0.4, 0.6]}]
        settings = {"settings": {HOSTILE: HOSTILE}}
        place = {"checkpoint": HOSTILE, "split": HOSTILE, "n": 9}
        write(one / "outcomes" / "last.json", place | settings | {"attacks": attacks})
        record = landscape_record(10, np.random.default_rng(0))
        write(one / "landscapes" / "last.json", record | place | settings)
        folders.append(one)
    return folders


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    ordinary = Parsed(page([synthetic_run(tmp_path / "ordinary" / "run")]))
    hostile = Parsed(page(hostile_runs(tmp_path / "hostile")))
    assert set(hostile.tags) <= set(ordinary.tags) | {"abbr"}
    assert not {"script", "img", "iframe", "object"} & set(hostile.tags)
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count("<script>alert(1)</script>") > 20


def test_figures_of_hostile_names_are_sound_xml(tmp_path: Path) -> None:
    drawn = re.findall(r"<svg .*?</svg>", page(hostile_runs(tmp_path)), flags=re.DOTALL)
    texts = ["".join(ElementTree.fromstring(svg).itertext()) for svg in drawn]
    assert len(texts) == 3
    assert all("<script>" in text for text in texts)


def test_names_are_not_formulas_and_any_alphabet_will_do(tmp_path: Path) -> None:
    text = page(
        [synthetic_run(tmp_path / str(i), recipe=name) for i, name in enumerate(("_$a_", "$\\frac{", "対抗 🧂"))]
    )
    assert "対抗 🧂 · g(0)" in text
    assert "_$a_ · g(0)" in text


def test_the_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    text = page(two_groups(tmp_path, [20, 21, 22], [10, 11, 12]))
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text).replace("http-equiv", "")
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    for name, value in Parsed(text).attributes:
        assert name not in ("src", "srcset", "action", "onload")
        if name.endswith("href"):
            assert value is not None
            assert value.startswith("#") or value == "data:,"


def test_ids_are_unique_and_every_reference_has_one(tmp_path: Path) -> None:
    text = page(two_groups(tmp_path, [20, 21], [10, 11]))
    attributes = Parsed(text).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in attributes if name.endswith("href") and value and value.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)


def test_figures_are_named_for_those_who_cannot_see_them(tmp_path: Path) -> None:
    attributes = Parsed(page(two_groups(tmp_path, [20], [10]))).attributes
    assert attributes.count(("role", "img")) == 4
    labels = [value for name, value in attributes if name == "aria-label" and value]
    assert any(label.startswith("Learning curves of at-awp, mean over seeds: at epoch 6") for label in labels)
    assert any(label.startswith("Centred curves. Robust loss along random directions") for label in labels)


def test_captions_state_the_measurement(tmp_path: Path) -> None:
    text = plain(Parsed(page(two_groups(tmp_path, [20, 20, 20], [10]))).text)
    for words in (
        "PGD-10, L-inf, eps 8/255, step 2/255, uniform start",
        "n = 1000 training and 2000 test images",
        "n = 500 test images, 11 values of α from −1.00 to 1.00",
        "at: 3 seeds × 4 directions; at-awp: 1 seed × 4 directions",
        "Direction: random, filter-normalised; attack: PGD-10, made afresh at each alpha; BatchNorm: eval mode",
        "g(0) = 1.400 ± 0.000",
        "Measured on device cpu",
    ):
        assert words in text


def test_configuration_shows_first_what_differs(tmp_path: Path) -> None:
    folders = [
        synthetic_run(tmp_path / recipe, recipe=recipe, config={"awp": {"gamma": gamma}})
        for recipe, gamma in (("at", 0.0), ("at-awp", 0.005))
    ]
    settings = report.configuration(report.grouped([report.read_run(folder) for folder in folders]))
    assert settings.heads == ("at", "at-awp")
    assert settings.different == (("awp.gamma", ("0.0", "0.005")),)
    assert ("attack.ball", "linf") in settings.common


def test_a_page_is_whole_or_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = synthetic_run(tmp_path / "run", landscape=False)
    path = tmp_path / "deep" / "report.html"
    report.write_report([folder], path, title="One & only")
    before = path.read_bytes()
    assert b"<title>One &amp; only" in before

    def refuse(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        report.write_report([folder], path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="at least one run"):
        report.write_report([], path)


def test_equal_records_give_an_equal_page_without_torch(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 21, 22], [10, 11, 12])
    here = page(folders)
    there = tmp_path / "there.html"
    program = (
        "import sys; from pathlib import Path; from saltflat.lab import figures, report; "
        "report.write_report([Path(p) for p in sys.argv[2:]], Path(sys.argv[1])); "
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    arguments = [sys.executable, "-c", program, str(there), *map(str, folders)]
    subprocess.run(arguments, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}, cwd=tmp_path)
    assert there.read_text(encoding="utf-8") == here


# --- Figures -------------------------------------------------------------------------------------------------------


def test_mean_curves_use_the_epochs_that_all_finished_seeds_have() -> None:
    def seed(epochs: list[float], level: float, averaged: bool = True) -> figures.SeedCurves:
        values = np.full(len(epochs), level)
        return figures.SeedCurves(np.array(epochs), values, values + 1, values + 2, best_epoch=None, averaged=averaged)

    epochs, (train, test, clean) = figures.mean_curves(
        [seed([1, 2, 3], 10.0), seed([2, 3], 20.0), seed([1], 99.0, averaged=False)]
    )
    np.testing.assert_array_equal(epochs, [2, 3])
    np.testing.assert_allclose([train, test, clean], [[15, 15], [16, 16], [17, 17]])


def test_landscape_statistics_match_the_statistics_module() -> None:
    curves = np.array([[1.0, 2.0], [3.0, 5.0], [8.0, np.inf]])
    mean, deviation = figures.mean_and_deviation(curves)
    assert mean[0] == pytest.approx(statistics.mean([1, 3, 8]))
    assert deviation[0] == pytest.approx(statistics.stdev([1, 3, 8]))
    assert np.isnan(mean[1])
    with pytest.raises(ValueError, match="alpha = 0"):
        figures.centre(np.array([-1.0, 1.0]), curves)


def test_a_figure_leaves_matplotlib_and_the_page_alone() -> None:
    before = dict(matplotlib.rcParams)
    alphas = np.linspace(-1, 1, 3)
    group = figures.GroupLandscape("at", alphas, (np.array([[2.0, 1.0, 2.0]]),))
    svg = figures.landscape([group], centred=True, note="n = 1", identity="one", description='"quoted" <words>')
    assert dict(matplotlib.rcParams) == before
    assert svg.startswith("<svg ")
    assert svg.endswith("</svg>")
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert "var(--series-1, #0a68a6)" in svg
    assert "font-family: var(--figure-font, sans-serif)" in svg
    assert ">at · g(0) = 1.000</text>" in svg
    with pytest.raises(ValueError, match="identity"):
        figures.landscape([group], centred=True, note="", identity='"><b>', description="")
