"""RobustBench entries, model cards, and folders for the hub that are there whole or not at all."""

import json
import shutil
import subprocess
import sys
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import saltflat
from saltflat.lab import export
from saltflat.lab.config import BadInput
from saltflat.lab.export import hub_folder, model_card, model_info, percent
from saltflat.models import named, published, wide_resnet

NAME = "wide-resnet-10-1"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def complaint(call, *arguments, **options):
    with pytest.raises(BadInput) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- RobustBench ---

# Fields and their types in the files under model_info/ of RobustBench's repository: in all 236 of them, in some.
IN_ALL = {
    "link": str, "name": str, "authors": str, "additional_data": bool, "number_forward_passes": int, "dataset": str,
    "venue": str, "architecture": str, "eps": str, "clean_acc": str, "reported": str,
}  # fmt: skip
IN_SOME = {"autoattack_acc": str, "footnote": str, "unreliable": bool}

MEASURED = {
    "dataset": "cifar10", "norm": "Linf", "eps": 8 / 255, "architecture": "WideResNet-34-10", "clean": 0.8536,
    "robust": 0.5617, "suite": "standard", "n": 10000, "of": 10000,
}  # fmt: skip
PAPER = {
    "name": "Adversarial Weight Perturbation Helps Robust Generalization",
    "authors": "Dongxian Wu, Shu-tao Xia, Yisen Wang",
    "link": "https://arxiv.org/abs/2004.05884",
    "venue": "NeurIPS 2020",
}


def test_an_entry_has_the_fields_of_robustbenchs_files():
    info = model_info(**MEASURED)
    assert {name: type(value) for name, value in info.items()} == IN_ALL | IN_SOME
    assert list(info)[: len(IN_ALL)] == list(IN_ALL)  # in their order
    assert json.loads(json.dumps(info)) == info


def test_an_entry_is_the_one_that_robustbench_has():
    """Of model_info/cifar10/Linf/Wu2020Adversarial.json, all but what is said of the evaluation."""
    info = model_info(**MEASURED, **PAPER, reported="56.17")
    footnote = info.pop("footnote")
    assert info == {
        **PAPER, "additional_data": False, "number_forward_passes": 1, "dataset": "cifar10",
        "architecture": "WideResNet-34-10", "eps": "8/255", "clean_acc": "85.36", "reported": "56.17",
        "autoattack_acc": "56.17", "unreliable": False,
    }  # fmt: skip
    assert footnote == f"AutoAttack's standard attacks as implemented in Saltflat {saltflat.__version__}."


def test_only_autoattack_fills_the_column_of_autoattack():
    info = model_info(**{**MEASURED, "suite": "fast"}, footnote="Trained on a phone.")
    assert "autoattack_acc" not in info
    assert info["footnote"] == "Trained on a phone. Robust accuracy under fast, which is not AutoAttack: 56.17."


def test_a_part_of_the_test_set_is_told():
    info = model_info(**{**MEASURED, "n": 500})
    assert info["footnote"].endswith(f"in Saltflat {saltflat.__version__}. Measured on 500 of 10000 test images.")


@pytest.mark.parametrize(("eps", "text"), [(8 / 255, "8/255"), (4 / 255, "4/255"), (0.5, "0.5"), (0.031, "0.031")])
def test_a_radius_is_written_as_there(eps, text):
    assert model_info(**{**MEASURED, "eps": eps})["eps"] == text


def test_what_is_told_of_the_paper_is_passed_on():
    info = model_info(**MEASURED, additional_data=True, number_forward_passes=3, unreliable=True)
    assert (info["additional_data"], info["number_forward_passes"], info["unreliable"]) == (True, 3, True)
    assert (info["name"], info["authors"], info["link"], info["venue"], info["reported"]) == ("",) * 5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dataset", "digits", "dataset: RobustBench has cifar10, cifar100, imagenet, got 'digits'"),
        ("norm", "L1", "norm: RobustBench has Linf and L2, got 'L1'"),
        ("norm", "linf", "norm: RobustBench has Linf and L2, got 'linf'"),
        ("eps", 0.0, "eps: expected a positive radius in pixel units, got 0"),
        ("eps", float("nan"), "eps: expected a positive radius in pixel units, got nan"),
        ("eps", float("inf"), "eps: expected a positive radius in pixel units, got inf"),
        ("robust", 0.9, "robust: expected 0 <= robust <= clean <= 1, got 0.9 and 0.8536"),
        ("robust", -0.1, "robust: expected 0 <= robust <= clean <= 1, got -0.1 and 0.8536"),
        ("robust", float("nan"), "robust: expected 0 <= robust <= clean <= 1, got nan and 0.8536"),
        ("clean", 85.36, "robust: expected 0 <= robust <= clean <= 1, got 0.5617 and 85.36"),
        ("n", 0, "n: expected between 1 and 10000 examples, got 0"),
        ("n", 10001, "n: expected between 1 and 10000 examples, got 10001"),
        ("number_forward_passes", 0, "number_forward_passes: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(field, value, message):
    assert complaint(model_info, **{**MEASURED, field: value}) == message


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_percent_is_the_nearest_of_two_digits(counts):
    right, n = counts
    text = percent(right / n)
    assert len(text.partition(".")[2]) == 2
    assert abs(Decimal(text) - Decimal(100 * right) / n) <= Decimal("0.005") + Decimal("1e-12")


def test_percent_of_ten_thousand_images_is_exact():
    for right in range(10001):
        expected = (Decimal(right) / 100).quantize(Decimal("0.01"), ROUND_HALF_EVEN)
        assert percent(right / 10000) == str(expected)


@pytest.mark.parametrize("share", [56.17, -0.01, 1.0001, float("nan")])
def test_percent_takes_shares_only(share):
    assert complaint(percent, share) == f"accuracy: expected a share between 0 and 1, got {share:g}"


# --- the card ---


def card(**changes):
    fields = {
        "architecture": "WideResNet-10-1", "dataset": "cifar10", "norm": "Linf", "eps": 8 / 255, "n": 500, "of": 10000,
        "accuracies": {"clean": 0.8165, "standard": 0.4812}, "config": {"name": NAME, "num_classes": 10},
    }  # fmt: skip
    return model_card("AT-AWP: é", **{**fields, **changes})


def header(text):
    first, inside, rest = text.split("---\n", 2)
    assert first == ""
    return yaml.safe_load(inside), rest


def test_the_header_is_yaml_that_the_hub_knows():
    fields, body = header(card(licence="mit"))
    assert fields == {
        "license": "mit",
        "library_name": "saltflat",
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "adversarial-training", "image-classification", "Linf", "cifar10"],
        "metrics": ["accuracy"],
        "datasets": ["uoft-cs/cifar10"],
    }
    assert body.startswith("\n# AT-AWP: é\n\nWideResNet-10-1, cifar10. ")
    assert header(card())[0]["license"] == "unknown"
    assert "datasets" not in header(card(dataset="digits"))[0]


def test_the_card_says_what_was_measured():
    _, body = header(card(text="A text\nof two lines.\n"))
    assert "\n\nA text\nof two lines.\n\n" in body
    assert "Threat model: Linf, eps 8/255, in pixel units." in body
    assert "Right answers on 500 of 10000 test images, in percent:" in body
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert table == ["| attack | accuracy |", "| --- | ---: |", "| clean | 81.65 |", "| standard | 48.12 |"]
    assert complaint(card, accuracies={"clean": 81.65}) == "accuracy: expected a share between 0 and 1, got 81.65"


def test_the_line_of_code_in_the_card_loads_the_model(tmp_path, monkeypatch):
    model, x = wide_resnet(10, 1, mean=MEAN, std=STD).eval(), torch.rand(2, 3, 8, 8)
    config = {"name": NAME, "mean": MEAN, "std": STD}
    hub_folder(tmp_path / "hub", model, x, config, card(config=config))
    code = (tmp_path / "hub" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "hub")
    names = {}
    exec(code, names)
    with torch.no_grad():
        assert torch.equal(names["model"](x), model(x))


# --- the folder ---


@pytest.fixture
def model():
    made = wide_resnet(10, 1, mean=MEAN, std=STD)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made


CONFIG = {"name": NAME, "num_classes": 10, "in_channels": 3, "mean": MEAN, "std": STD}
X = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_holds_all_that_loads_the_model(model, tmp_path):
    outcome = tmp_path / "last-test-1.json"
    outcome.write_text("{}")
    hub_folder(tmp_path / "far" / "hub", model, X, CONFIG, card(), [outcome])
    folder = tmp_path / "far" / "hub"
    assert entries(tmp_path / "far") == [
        "hub", "hub/README.md", "hub/config.json", "hub/model.safetensors", "hub/outcomes",
        "hub/outcomes/last-test-1.json",
    ]  # fmt: skip
    assert (folder / "README.md").read_text() == card()
    assert (folder / "outcomes" / outcome.name).read_text() == "{}"
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    again = published.load(folder / "model.safetensors", **json.loads((folder / "config.json").read_text()))
    assert model.training  # as it was
    with torch.no_grad():
        assert torch.equal(again(X), model.eval()(X))


def test_an_empty_folder_will_do_and_so_will_a_link_to_it(model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    hub_folder(tmp_path / "link", model, X, CONFIG, card())
    assert entries(tmp_path / "empty") == ["README.md", "config.json", "model.safetensors"]
    assert (tmp_path / "link").is_symlink()


def test_nothing_is_overwritten(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        message = f"out: expected a folder that is new or empty, got {str(tmp_path / name)!r}"
        assert complaint(hub_folder, tmp_path / name, model, X, CONFIG, card()) == message
    assert entries(tmp_path) == ["file", "full", "full/notes.txt"]
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_outcomes_must_be_files_of_different_names(model, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "same.json").touch()
    same = [tmp_path / "a" / "same.json", tmp_path / "b" / "same.json"]
    message = complaint(hub_folder, tmp_path / "hub", model, X, CONFIG, card(), same)
    assert message == "outcomes: expected names that differ, got same.json, same.json"
    for path in (tmp_path / "a", tmp_path / "none.json"):
        message = complaint(hub_folder, tmp_path / "hub", model, X, CONFIG, card(), [path])
        assert message == f"outcomes: expected a file, got {str(path)!r}"
    assert not (tmp_path / "hub").exists()


def test_a_folder_that_cannot_be_made_says_so(model, tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "hub"
    message = complaint(hub_folder, place, model, X, CONFIG, card())
    assert message == f"out: cannot make {str(place)!r}: Not a directory"
    assert entries(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None, "std": None}, "its logits differ by"),  # the normalisation is forgotten
        ({"std": (0.2, 0.25, 0.35)}, "its logits differ by"),
        ({"name": "wide-resnet-16-1"}, "weights of another architecture: lacks 'block1.layer.1.bn1.weight'"),
        ({"num_classes": 100}, "weights of another architecture: 'fc.weight' has shape (10, 64), expected (100, 64)"),
        ({"name": "resnet"}, "network: expected preact-resnet18,"),
    ],
)
def test_a_config_that_does_not_give_the_model_back_is_refused(change, message, model, tmp_path):
    config = {**CONFIG, **change}
    found = complaint(hub_folder, tmp_path / "hub", model, X, config, card())
    assert found.startswith(f"config: expected the arguments that load the model, got {config}: {message}")
    assert entries(tmp_path) == []


def test_a_model_of_a_users_own_comes_back_too(tmp_path):
    model = named("saltflat.models:small_resnet", mean=MEAN, std=STD).double()
    config = {"name": "saltflat.models:small_resnet", "mean": MEAN, "std": STD}
    hub_folder(tmp_path / "hub", model, X, config, card())
    assert {t.dtype for t in load_file(tmp_path / "hub" / "model.safetensors").values() if t.ndim} == {torch.float64}


def broken(*_):
    raise OSError(28, "No space left on device")


def interrupted(*_):
    raise KeyboardInterrupt


STEPS = ["save_weights", "_check_comes_back", "write_text", "shutil.copyfile", "Path.rename"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", [broken, interrupted])
def test_a_fault_at_any_step_leaves_nothing(step, fault, model, tmp_path, monkeypatch):
    (tmp_path / "outcome.json").touch()
    if step == "Path.rename":
        monkeypatch.setattr(Path, "rename", fault)
    else:
        monkeypatch.setattr(export.shutil if "." in step else export, step.rpartition(".")[2], fault)
    arguments = tmp_path / "hub", model, X, CONFIG, card(), [tmp_path / "outcome.json"]
    if fault is broken:
        message = complaint(hub_folder, *arguments)
        assert message == f"out: cannot make {str(tmp_path / 'hub')!r}: No space left on device"
    else:
        with pytest.raises(KeyboardInterrupt):
            hub_folder(*arguments)
    assert entries(tmp_path) == ["outcome.json"]


def test_a_disk_that_is_full_while_weights_are_written_says_so(model, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_weights", full)
    message = complaint(hub_folder, tmp_path / "hub", model, X, CONFIG, card())
    assert message == f"out: cannot make {str(tmp_path / 'hub')!r}: I/O error: No space left on device (os error 28)"
    assert entries(tmp_path) == []


KILLED = """
import os, sys
from pathlib import Path
import torch
from saltflat.lab import export
from saltflat.models import wide_resnet

setattr(*{"text": (export, "write_text"), "copy": (export.shutil, "copyfile"), "rename": (Path, "rename")}[sys.argv[1]],
        lambda *_: os._exit(9))
x, config = torch.rand(2, 3, 8, 8), {"name": "wide-resnet-10-1"}
export.hub_folder(Path("hub"), wide_resnet(10, 1), x, config, "# card", [Path("outcome.json")])
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["text", "copy", "rename"])
def test_a_killed_process_leaves_nothing_that_looks_whole_or_stands_in_the_way(step, model, tmp_path):
    (tmp_path / "outcome.json").touch()
    process = subprocess.run([sys.executable, "-c", KILLED, step], cwd=tmp_path, timeout=120)
    assert process.returncode == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hub.new", "outcome.json"]
    hub_folder(tmp_path / "hub", model, X, CONFIG, card())
    assert entries(tmp_path / "hub") == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "outcome.json"]


def test_what_another_left_behind_is_cleared_away(model, tmp_path):
    (tmp_path / ".hub.new" / "outcomes").mkdir(parents=True)
    (tmp_path / ".hub.new" / "outcomes" / "old.json").touch()
    hub_folder(tmp_path / "hub", model, X, CONFIG, card())
    assert entries(tmp_path) == ["hub", "hub/README.md", "hub/config.json", "hub/model.safetensors"]
    shutil.rmtree(tmp_path / "hub")
