"""What an evaluation keeps to be looked at: images that fool the network, within the threat model, the first ones."""

import base64
import json
import shutil

import numpy as np
import pytest
import torch
from commands import QUICK, run

from saltflat.data import digits
from saltflat.evaluation import suite
from saltflat.evaluation.suite import Verdicts
from saltflat.lab import examples, subjects, verdicts_file
from saltflat.lab.report import read_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "at"
    run("train", "at", *QUICK, "--out", folder)
    return folder


@pytest.fixture
def fresh(trained, tmp_path):
    """A run that was not evaluated yet."""
    shutil.copytree(trained, tmp_path / "run")
    for kind in ("outcomes", "examples"):
        shutil.rmtree(tmp_path / "run" / kind, ignore_errors=True)
    return tmp_path / "run"


def found(folder):
    (path,) = (folder / "examples").glob("*.json")
    (outcomes,) = (folder / "outcomes").glob("*.npz")
    assert path.stem == outcomes.stem
    return json.loads(path.read_text()), np.load(outcomes)


def image(text, shape):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy().reshape(shape))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_they_are_the_first_that_were_fooled_and_fool_the_network(fresh, precision):
    attacks = ["clean", "fgsm", "apgd-ce+square"]
    run("evaluate", fresh, "--examples", "60", "--attacks", *attacks, "--precision", precision, "--batch-size", "7")
    record, arrays = found(fresh)
    of = subjects.from_run(fresh, "best", "cpu")
    rows = arrays["example"].tolist()
    by = [arrays[f"{name}_by"] for name in attacks]
    fooled = sorted(rows[i] for i in range(len(rows)) if any(each[i] > 0 for each in by))
    kept = [one["example"] for one in record["examples"]]
    assert kept == fooled[: examples.KEPT]
    assert record["n"] == 60
    assert record["threat"] == str(of.threat)
    for one in record["examples"]:
        x, x_adv = (image(one[part], record["shape"]) for part in ("clean", "attacked"))
        assert torch.equal(x, digits().test.images[one["example"]] / 255)
        assert float((x_adv.double() - x.double()).abs().max()) <= of.threat.eps + 1e-7
        assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
        with torch.no_grad():
            clean, attacked = (int(of.model(each[None]).argmax()) for each in (x, x_adv))
        assert clean == one["label"] == int(digits().test.labels[one["example"]])
        assert attacked == one["predicted"] != clean
        row = rows.index(one["example"])
        stage = {1: "apgd-ce", 2: "square"}.get(int(by[2][row]))
        assert one["attack"] == ("fgsm" if by[1][row] > 0 else f"apgd-ce+square: {stage}")


def test_the_report_shows_them_as_they_are_on_record(fresh):
    run("evaluate", fresh, "--examples", "40", "--attacks", "clean", "fgsm")
    record, _ = found(fresh)
    (kept,) = read_run(fresh).examples
    assert [one.example for one in kept.examples] == [one["example"] for one in record["examples"]]
    first = image(record["examples"][0]["attacked"], record["shape"]).permute(1, 2, 0).numpy()
    assert np.array_equal(kept.examples[0].attacked, first)


def test_an_evaluation_that_goes_on_keeps_the_same(fresh, monkeypatch):
    words = ["evaluate", fresh, "--examples", "30", "--attacks", "clean", "pgd-3", "--batch-size", "8"]
    run(*words)
    (path,) = (fresh / "examples").iterdir()
    whole = path.read_bytes()
    for kind in ("outcomes", "examples"):
        shutil.rmtree(fresh / kind)
    write, left = verdicts_file.write, [5]

    class Killed(BaseException):
        pass

    def killing(*arguments):
        write(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(verdicts_file, "write", killing)
    with pytest.raises(Killed):
        run(*words)
    assert not (fresh / "examples").exists()
    run(*words)
    assert path.read_bytes() == whole


def test_without_an_attack_there_is_nothing_to_keep(fresh):
    run("evaluate", fresh, "--examples", "20", "--attacks", "clean")
    assert not (fresh / "examples").exists()


def kept_of(tmp_path, trained, x, y, eps=0.15):
    """The file that is written if FGSM is said to have fooled the network with all of these; None if none is."""
    of = subjects.with_threat(subjects.from_run(trained, "best", "cpu"), None, eps, None)
    path, fooled = tmp_path / "examples" / "one.json", torch.ones(len(y), dtype=torch.int64)
    column, verdicts = suite.fgsm(of.threat.ball), {"fgsm": Verdicts(fooled, fooled, fooled.float())}
    examples.keep(path, {}, of, [column], verdicts, (x, y, torch.arange(len(y))), seed=0)
    return json.loads(path.read_text()) if path.is_file() else None


def test_what_does_not_fool_the_network_is_left_out_whatever_its_verdict_says(tmp_path, trained):
    of, test = subjects.from_run(trained, "best", "cpu"), digits().test
    with torch.no_grad():
        right = (of.model(test.images / 255).argmax(1) == test.labels).nonzero()[:8, 0]
    x, y = test.images[right], test.labels[right]
    assert kept_of(tmp_path, trained, x, y, eps=1e-6) is None
    assert kept_of(tmp_path, trained, x, (y + 1) % 10, eps=1e-6) is not None  # wrong whatever is done to it


def test_inputs_that_are_no_images_are_not_kept(tmp_path, trained):
    y = torch.zeros(4, dtype=torch.int64)
    assert kept_of(tmp_path, trained, torch.rand(4, 2), y) is None
    assert kept_of(tmp_path, trained, torch.rand(4, 2, 8, 8), y) is None


def test_of_large_images_fewer_are_kept(tmp_path, trained, monkeypatch):
    test = digits().test
    wrong = (test.labels[:40] + 1) % 10
    everything = kept_of(tmp_path, trained, test.images[:40], wrong, eps=1e-6)
    assert len(everything["examples"]) > 5
    monkeypatch.setattr(examples, "MOST", 3 * 64)
    fewer = kept_of(tmp_path, trained, test.images[:40], wrong, eps=1e-6)
    assert fewer["examples"] == everything["examples"][: len(fewer["examples"])]
    assert len(fewer["examples"]) <= 3
