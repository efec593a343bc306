"""The robust gap on record: both sides by one attack, at w, in eval mode."""

import json

import pytest
import torch
from networks import convolutional, equal_states, state

from saltflat.data import Images
from saltflat.evaluation import outcomes
from saltflat.lab import record
from saltflat.lab.config import BadInput
from saltflat.lab.gaps import How, robust_gap
from saltflat.lab.subjects import Subject
from saltflat.lab.threat import Threat

HOW = How(train_examples=0, test_examples=0, steps=3, checked_examples=6, batch_size=8, seed=2)


def subject(folder):
    x = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8)
    y = torch.arange(50) % 3
    splits = {"train": (x[:30], y[:30]), "test": (x[30:], y[30:])}
    return Subject(folder, "last", "0123", "w", convolutional().train(), splits, Threat("Linf", 0.1, 0.05))


def test_both_sides_are_the_evaluation_s_and_the_gap_their_difference(tmp_path):
    of = subject(tmp_path)
    before = state(of.model)
    found = robust_gap(of, HOW)
    sides = {}
    for split, (x, y) in of.splits.items():
        images = Images(x, y, 3, split)
        robust = outcomes(of.model, images, of.threat.pgd(3), batch_size=8, seed=2)
        clean = outcomes(of.model, images, None, batch_size=8)
        sides[split] = robust
        assert found[split] == {
            "n": len(y),
            "clean_accuracy": clean.accuracy,
            "clean_loss": clean.mean_loss,
            "robust_accuracy": robust.accuracy,
            "robust_loss": robust.mean_loss,
            "robust_accuracy_error": pytest.approx((robust.correct.double().std(correction=0) / len(y) ** 0.5).item()),
            "robust_loss_error": pytest.approx((robust.loss.std() / len(y) ** 0.5).item()),
        }
    assert found["gap"]["loss"] == sides["test"].mean_loss - sides["train"].mean_loss
    assert found["gap"]["accuracy"] == sides["train"].accuracy - sides["test"].accuracy
    for name in ("loss", "accuracy"):
        errors = [found[split][f"robust_{name}_error"] for split in ("train", "test")]
        assert found["gap"][f"{name}_error"] == pytest.approx(sum(error**2 for error in errors) ** 0.5)
    assert found["longer"]["steps"] == 15
    assert found["longer"]["loss"] > 0
    assert equal_states(state(of.model), before)
    assert of.model.training  # the mode came back


def test_a_longer_attack_is_that_of_more_steps_on_the_first_examples(tmp_path):
    of = subject(tmp_path)
    longer = robust_gap(of, HOW)["longer"]
    images = Images(of.splits["test"][0][:6], of.splits["test"][1][:6], 3, "some")
    assert longer["n"] == 6
    assert longer["loss_of_the_attack"] == outcomes(of.model, images, of.threat.pgd(3), batch_size=8, seed=2).mean_loss
    assert longer["loss"] == outcomes(of.model, images, of.threat.pgd(15), batch_size=8, seed=2).mean_loss


def test_what_was_measured_is_read_and_other_settings_have_a_file_of_their_own(tmp_path):
    of = subject(tmp_path)
    found = robust_gap(of, HOW)
    (path,) = (tmp_path / "gaps").iterdir()
    assert record.read_again(path) == found
    path.write_text(json.dumps(found | {"seen": True}))
    assert robust_gap(of, HOW)["seen"]
    robust_gap(of, How(train_examples=9, test_examples=0, steps=3, batch_size=8, seed=2))
    assert len(list((tmp_path / "gaps").iterdir())) == 2


def test_a_finished_file_that_is_damaged_is_not_believed(tmp_path):
    of = subject(tmp_path)
    robust_gap(of, HOW)
    (path,) = (tmp_path / "gaps").iterdir()
    path.write_text("{}")
    with pytest.raises(BadInput, match="it lacks n; delete it to begin anew"):
        robust_gap(of, HOW)


def test_more_examples_than_there_are_are_all(tmp_path):
    found = robust_gap(subject(tmp_path), How(train_examples=1000, test_examples=9, steps=1, checked_examples=2))
    assert found["n"] == {"train": 30, "test": 9}


def test_without_training_images_there_is_no_gap(tmp_path):
    of = subject(tmp_path)
    of = Subject(of.folder, "last", "0123", "w", of.model, {"test": of.splits["test"]}, of.threat)
    with pytest.raises(BadInput, match="split: expected one of test, got 'train'"):
        robust_gap(of, HOW)
