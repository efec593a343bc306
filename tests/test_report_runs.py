"""Run folders with missing and damaged parts: skipped, and said on the page."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import (
    Parsed,
    environment,
    groups_in,
    landscape_record,
    outcome,
    page,
    plain,
    synthetic_run,
    two_groups,
    write,
)

from saltflat.lab.report import read_run
from saltflat.lab.report.words import headline


@pytest.mark.parametrize(
    "content", [None, "a: [", "just words", "seed: 0", "recipe: at", "recipe: at\nseed: yes", "recipe: [at]\nseed: 0"]
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"no run, config\.yaml") as refusal:
        read_run(tmp_path)
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
        "No final evaluation: run saltflat evaluate",
        "No weight loss landscape",
        "No per-epoch measurements were found",
        "No landscape was measured",
    ):
        assert words in text


def test_a_cut_last_line_is_skipped_and_said(tmp_path: Path) -> None:
    folder = synthetic_run(tmp_path / "run", epochs=5)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-60])
    run = read_run(folder)
    assert [epoch.number for epoch in run.epochs] == [1, 2, 3, 4]
    text = Parsed(page([folder])).text
    assert "The last line of metrics.jsonl is cut and was skipped" in text
    assert "Stopped after epoch 4 of 5" in text


def test_an_unfinished_run_stays_out_of_the_means(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 21, 22, 23], [])
    path = folders[3] / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    groups = groups_in(folders)
    assert [run.seed for run in groups[0].finished] == [0, 1, 2]
    assert "21.00 ± 1.00 points" in plain(headline(groups)[0].claim)
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


def test_what_was_measured_on_weights_that_are_gone_is_left_out_and_said(tmp_path: Path) -> None:
    """A training that went on has put others in their place; where no weights are kept, nothing is left out."""
    folder = synthetic_run(tmp_path / "run")
    now = hashlib.sha256(b"now").hexdigest()[:16]
    for name, sha256 in (("before", "0123456789abcdef"), ("last", now)):
        robust = 10.0 if name == "before" else 40.0
        write(folder / "outcomes" / f"{name}.json", outcome("last", robust) | {"sha256": sha256})
    assert len(read_run(folder).outcomes) == 3
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.safetensors").write_bytes(b"now")
    run = read_run(folder)
    assert sorted(one.attacks[2].accuracy for one in run.outcomes if one.checkpoint == "last") == [0.4]
    assert "Left out, since its checkpoint holds other weights now: outcomes/before.json" in Parsed(page([folder])).text


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


def test_landscapes_measured_in_different_ways_are_drawn_apart(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20, 20], [])
    write(folders[1] / "landscapes" / "other.json", landscape_record(10, np.random.default_rng(0), points=21))
    text = Parsed(page(folders)).text
    assert "at: 2 seeds × 4 directions" in text  # those that agree
    assert "at: 1 seed × 4 directions" in text  # the other, by itself
    assert "21 values of α" in text


def test_what_speaks_against_a_comparison_is_said(tmp_path: Path) -> None:
    folders = two_groups(tmp_path, [20], [10])
    other = synthetic_run(tmp_path / "again", recipe="at", seed=0)
    write(folders[1] / "evaluation.json", {"attack": "FGSM", "mode": "eval"})
    more = {"threads": 8, "precision": "tf32", "git": {"commit": "9", "dirty": True}}
    write(folders[0] / "environment.json", environment(0) | {"precision": "fp32"})
    write(folders[1] / "environment.json", environment(0) | more)
    text = Parsed(page([*folders, other, folders[0]])).text
    for words in (
        "1 run of equal configuration and seed left out",
        "The epochs were measured with different attacks",
        "The runs come from different numbers of threads",
        "The runs come from different commits",
        "The runs were trained in different precisions",
        "The working tree had uncommitted changes",
    ):
        assert words in text
