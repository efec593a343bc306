"""What people typed into a record's README about its setting is what the record's own files say."""

import json
import re
from pathlib import Path

import pytest
import torch

from records.generate import made_anew
from saltflat.data import Images
from saltflat.lab.build import network
from saltflat.lab.config import Train, checked

RECORDS = Path(__file__).parent.parent / "records"
CIFAR10 = RECORDS / "2026-11-26_claims-cifar10"
SHAPES = {CIFAR10: (3, 32, 32), RECORDS / "2026-11-26_claims-digits": (1, 8, 8)}


def setting(record: Path) -> str:
    """What stands before the generated block, on one line."""
    return " ".join((record / "README.md").read_text().partition("<!-- generated")[0].split())


def config_of(record: Path, arm: str = "at") -> Train:
    config = json.loads((record / "results" / f"{arm}-seed0.json").read_text())["config"]
    path = None if config["data"]["name"] == "digits" else "unread"  # records leave out where files were
    return checked({**config, "data": {**config["data"], "path": path}})


@pytest.mark.parametrize("record", SHAPES, ids=lambda record: record.name)
def test_the_setting_is_that_of_the_configs(record):
    said, config = setting(record), config_of(record)
    assert f"{config.data.examples:,} training images" in said
    assert f"{config.data.validation_examples} more for validation" in said
    assert f"{config.optimizer.epochs} epochs, batches of {config.optimizer.batch_size}" in said
    assert f"the learning rate {config.optimizer.learning_rate} divided by 10 at 50 % and at 75 %" in said
    assert config.optimizer.schedule == "piecewise"
    assert f"PGD-{config.attack.steps} in training" in said
    assert re.search(r"L-inf, eps (8/255|0\.15),", said)[1] == {8 / 255: "8/255", 0.15: "0.15"}[config.attack.eps]


@pytest.mark.parametrize("record", SHAPES, ids=lambda record: record.name)
def test_the_network_is_as_large_as_is_said(record):
    like = Images(torch.zeros(1, *SHAPES[record], dtype=torch.uint8), torch.tensor([0]), num_classes=10, name="like")
    parameters = sum(weights.numel() for weights in network(config_of(record), like).parameters())
    said = re.search(r"([\d,]+) (?:parameters|weights)", setting(record))[1]
    assert float(said.replace(",", "")) == pytest.approx(parameters, rel=0.02 if said.endswith(",000") else 0)


def test_the_second_architecture_is_as_large_as_is_said():
    config = config_of(CIFAR10, "at-wrn")
    like = Images(torch.zeros(1, *SHAPES[CIFAR10], dtype=torch.uint8), torch.tensor([0]), num_classes=10, name="like")
    parameters = sum(weights.numel() for weights in network(config, like).parameters())
    assert f"a WRN-{config.model.depth}-{config.model.widen_factor} of {parameters:,}" in setting(CIFAR10)


def test_the_labels_of_rst_are_as_right_as_is_said():
    given, true = ("".join((CIFAR10 / name).read_text().split()) for name in ("labels.txt", "true-labels.txt"))
    share = sum(a == b for a, b in zip(given, true, strict=True)) / len(true)
    assert f"right on {100 * share:.1f} % of the {len(true):,}" in setting(CIFAR10)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- generated: A -->\nby hand\n<!-- generated: B -->\nmade\n<!-- end -->",
        "<!-- generated: A -->\nmade\n<!-- end -->\nby hand\n<!-- end -->",
        "by hand\n<!-- generated: A -->\n",
    ],
)
def test_nothing_written_by_hand_is_taken_for_a_block(text):
    with pytest.raises(ValueError, match=r"^a page in .*: expected an `<!-- end -->` after every"):
        made_anew(text, RECORDS)
