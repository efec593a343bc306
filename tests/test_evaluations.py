"""`saltflat evaluate` and `export`: outcomes on disk, going on after a kill, checkpoints of others, bad input."""

import json
import pickle
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from commands import QUICK, run
from safetensors.torch import load_file, save_file
from torch import nn

from saltflat.data import digits, to_float
from saltflat.evaluation import suite
from saltflat.lab import evaluations, subjects, verdicts_file
from saltflat.lab.config import BadInput
from saltflat.models import published, small_cnn

ATTACKS = ["--attacks", "clean", "pgd-3", "cw-2+pgd-2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "at"
    run("train", "at", *QUICK, "--out", folder)
    return folder


@pytest.fixture
def fresh(trained, tmp_path):
    """A run that was not evaluated yet."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "outcomes", ignore_errors=True)
    return tmp_path / "run"


def found(folder):
    (path,) = (folder / "outcomes").glob("*.json")
    return json.loads(path.read_text()), np.load(path.with_suffix(".npz"))


def test_the_record_holds_every_example_and_the_summary_follows_from_it(fresh):
    run("evaluate", fresh, "--examples", "40", *ATTACKS, "--batch-size", "16")
    summary, arrays = found(fresh)
    labels = digits().test.labels.numpy()[arrays["example"]]
    assert np.array_equal(arrays["label"], labels)
    assert np.bincount(labels).min() >= 3  # stratified
    for row in summary["attacks"]:
        by, iteration, margin = (arrays[f"{row['name']}_{part}"] for part in verdicts_file.PARTS)
        assert row["accuracy"] == (by == -1).mean()
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert ((iteration >= 0) == (by >= 0)).all()
        assert ((margin >= 0) | (by == -1)).all()
        assert by.max() <= len(row["stages"])
    assert summary["attacks"][2]["stages"] == ["cw-2", "pgd-2"]
    assert list(summary["attacks"][2]["left"]) == ["cw-2", "pgd-2"]
    assert summary["attacks"][2]["left"]["pgd-2"] == summary["attacks"][2]["accuracy"]
    assert summary["threat"] == {"norm": "Linf", "eps": 0.15, "step_size": 0.0375}
    assert summary["settings"]["precision"] == "fp32"
    assert summary["environment"]["torch"] == version("torch")
    assert not list((fresh / "outcomes").glob("*.part"))


def test_the_record_is_what_the_library_finds(fresh):
    run("evaluate", fresh, "--examples", "30", *ATTACKS, "--seed", "7")
    _, arrays = found(fresh)
    of = subjects.from_run(fresh, "best", "cpu")
    x, y, rows = subjects.chosen(of, "test", 30)
    ball = of.threat.ball
    columns = [suite.Column("clean"), suite.pgd(ball, 3, of.threat.step_size)]
    *_, last = suite.evaluate(of.model, x, y, columns, seed=7, ids=rows)
    for name, of_column in last.verdicts.items():
        assert np.array_equal(of_column.by.numpy(), arrays[f"{name}_by"])
        assert np.array_equal(of_column.margin.numpy(), arrays[f"{name}_margin"])


class Killed(BaseException):
    pass


def test_killed_after_any_batch_it_ends_with_the_same_outcomes_and_repeats_one_at_most(fresh, monkeypatch, capsys):
    words = ["evaluate", fresh, "--examples", "30", *ATTACKS, "--batch-size", "4"]
    run(*words)
    whole = {name: values.copy() for name, values in found(fresh)[1].items() if name != "reached"}
    write, batches = verdicts_file.write, []

    def counted(path, *arguments):
        write(path, *arguments)
        batches.append(path.suffix)

    monkeypatch.setattr(verdicts_file, "write", counted)
    shutil.rmtree(fresh / "outcomes")
    run(*words)
    total = batches.count(".part")
    assert total > 8
    for at in range(1, total + 1):
        shutil.rmtree(fresh / "outcomes")
        for before in (True, False):  # the file of this batch was, or was not, written yet

            def killing(path, *arguments, before=before, left=[at]):  # noqa: B006 (a counter of its own)
                left[0] -= 1
                if left[0] == 0 and before:
                    raise Killed
                write(path, *arguments)
                if left[0] == 0:
                    raise Killed

            shutil.rmtree(fresh / "outcomes", ignore_errors=True)
            monkeypatch.setattr(verdicts_file, "write", killing)
            with pytest.raises(Killed):
                run(*words)
            assert not list((fresh / "outcomes").glob("*.json"))
            batches.clear()
            monkeypatch.setattr(verdicts_file, "write", counted)
            run(*words)
            assert batches.count(".part") == total - at + before
            again = found(fresh)[1]
            assert all(np.array_equal(again[name], values) for name, values in whole.items())
    assert "goes on after" in capsys.readouterr().out


def test_a_cut_outcomes_file_is_refused_in_one_line(fresh, monkeypatch, capsys):
    words = ["evaluate", fresh, "--examples", "20", "--attacks", "clean", "pgd-2"]
    run(*words)
    (path,) = (fresh / "outcomes").glob("*.npz")
    for target, others in ((path, True), (path.with_suffix(".json"), True), (path.with_suffix(".part"), False)):
        kept = {file: file.read_bytes() for file in (fresh / "outcomes").iterdir()}
        whole = path.read_bytes() if target.suffix == ".part" else target.read_bytes()
        target.write_bytes(whole[: len(whole) // 2])
        if not others:
            path.with_suffix(".json").unlink()
        cut = {file: file.read_bytes() for file in (fresh / "outcomes").iterdir()}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*words)
        printed = capsys.readouterr().err
        assert stop.value.code == 2
        assert printed.startswith("saltflat: outcomes: ")
        assert "delete it to begin anew" in printed
        assert printed.count("\n") == 1
        assert {file: file.read_bytes() for file in (fresh / "outcomes").iterdir()} == cut
        for file, content in kept.items():
            file.write_bytes(content)


def test_what_is_deleted_of_a_damaged_pair_begins_anew(fresh, capsys):
    words = ["evaluate", fresh, "--examples", "20", "--attacks", "clean", "pgd-2"]
    run(*words)
    (path,) = (fresh / "outcomes").glob("*.npz")
    whole = dict(np.load(path))
    for gone in (path, path.with_suffix(".json")):
        gone.write_bytes(gone.read_bytes()[:100])
        with pytest.raises(SystemExit):
            run(*words)
        assert f"{gone}" in (said := capsys.readouterr().err)
        assert "delete it to begin anew" in said
        gone.unlink()
        run(*words)
        assert ("begins anew" in capsys.readouterr().out) == (gone == path)
        _, again = found(fresh)
        names = set(whole) - {"reached"}  # seconds are in there
        assert all(np.array_equal(again[name], whole[name]) for name in names)
        run(*words)
        assert "already there" in capsys.readouterr().out


def test_a_file_of_other_examples_is_refused(fresh):
    run("evaluate", fresh, "--examples", "20", "--attacks", "clean")
    (path,) = (fresh / "outcomes").glob("*.npz")
    labels = torch.from_numpy(np.load(path)["label"])
    assert verdicts_file.read(path, ["clean"], labels).done.verdicts["clean"].by.shape == (20,)
    for wrong in (labels[:10], labels.flip(0)):
        with pytest.raises(BadInput, match="is of other examples"):
            verdicts_file.read(path, ["clean"], wrong)
    with pytest.raises(BadInput, match="there is no array 'fgsm_by' in it"):
        verdicts_file.read(path, ["clean", "fgsm"], labels)


def test_precision_padding_and_batch_size_are_on_record_and_told_apart(fresh):
    settings = (["--precision", "bf16"], ["--precision", "fp16"], ["--padded"], ["--batch-size", "8"], ["--norm", "L2"])
    for words in settings:
        more = ["--eps", "0.5"] if "L2" in words else []
        run("evaluate", fresh, "--examples", "20", "--attacks", "clean", "apgd-ce", *words, *more)
    summaries = [json.loads(path.read_text()) for path in (fresh / "outcomes").glob("*.json")]
    assert len(summaries) == len(settings)
    assert {summary["settings"]["precision"] for summary in summaries} == {"fp32", "bf16", "fp16"}
    (l2,) = [summary["threat"] for summary in summaries if summary["threat"]["norm"] == "L2"]
    assert l2 == {"norm": "L2", "eps": 0.5, "step_size": 0.125}


def test_reasons_to_doubt_are_printed_before_the_number_and_kept(fresh, capsys):
    run("evaluate", fresh, "--examples", "20", "--attacks", "clean", "fgsm", "--norm", "L2", "--eps", "8/255")
    summary, _ = found(fresh)
    printed = capsys.readouterr().out
    assert [flag["name"] for flag in summary["flags"]] == ["unusual_eps"]
    assert summary["flags"][0]["explanation"] in " ".join(printed.split())
    assert printed.index("caution, unusual_eps") < printed.index("95 % interval")
    run("evaluate", fresh, "--examples", "20", "--attacks", "clean", "fgsm", "--norm", "L2", "--eps", "8/255")
    assert "caution, unusual_eps" in capsys.readouterr().out  # also when it is read again


def test_logits_beyond_half_precision_are_refused_in_one_line(fresh, tmp_path, capsys):
    weights = load_file(fresh / "checkpoints" / "best.safetensors")
    last = list(weights)[-1].rpartition(".")[0]
    save_file(
        {name: 1e7 * w if name.startswith(last) else w for name, w in weights.items()}, tmp_path / "large.safetensors"
    )
    words = ["evaluate", fresh, "--weights", tmp_path / "large.safetensors", "--attacks", "clean", "apgd-ce"]
    with pytest.raises(SystemExit) as stop:
        run(*words, "--examples", "20", "--precision", "fp16")
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith("saltflat: model: ")
    assert printed.count("\n") == 1
    assert not (fresh / "outcomes").exists()
    run(*words, "--examples", "20")


def digits_network():
    torch.manual_seed(0)
    return small_cnn(10, in_channels=1, width=4)


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint of others in RobustBench's layout, and data as arrays."""
    model, x, y = digits_network(), digits().test.images[:50], digits().test.labels[:50]
    torch.save({"state_dict": nn.DataParallel(model).state_dict()}, tmp_path / "theirs.pt")
    np.savez(tmp_path / "mine.npz", x=to_float(x).numpy(), y=y.numpy())
    return model, tmp_path


def test_a_checkpoint_of_others_is_evaluated_into_a_folder(foreign, monkeypatch):
    model, folder = foreign
    monkeypatch.chdir(folder)
    words = ["evaluate", "theirs.pt", "--model", "small-cnn-4", "--eps", "0.1", "--attacks", "clean", "pgd-2"]
    run(*words, "--data", "digits", "--examples", "50")
    run(*words, "--data", "npz", "--data-path", "mine.npz", "--out", "elsewhere")
    summary, arrays = found(folder / "evaluations" / "theirs")
    assert summary["threat"] == {"norm": "Linf", "eps": 0.1, "step_size": 0.025}
    x = to_float(digits().test.images)[arrays["example"]]
    with torch.no_grad():
        right = model(x).argmax(1).numpy() == arrays["label"]
    assert np.array_equal(arrays["clean_by"] == -1, right)
    assert found(folder / "elsewhere")[0]["n"] == 50


def test_a_factory_in_the_current_folder_is_a_network(foreign, monkeypatch):
    _, folder = foreign
    monkeypatch.chdir(folder)
    (folder / "my_networks.py").write_text(
        "from saltflat.models import small_cnn\n\ndef mine():\n    return small_cnn(10, in_channels=1, width=4)\n"
    )
    run(
        "evaluate", "theirs.pt", "--model", "my_networks:mine", "--data", "digits", "--eps", "0.1", "--attacks", "clean"
    )
    assert found(folder / "evaluations" / "theirs")[0]["n"] == 597


class Harmful:
    def __reduce__(self):
        import os

        return os.mkdir, ("harmed",)


def bad_foreign(folder):
    """name -> (more arguments, what the line must hold)"""
    x, y = np.zeros((4, 1, 8, 8), np.float32), np.array([0, 1, 2, 3])
    files = {
        "pixels": {"x": x + 255, "y": y},
        "labels": {"x": x, "y": y[:3]},
        "empty": {"x": x[:0], "y": y[:0]},
        "classes": {"x": x, "y": y + 90},
    }
    for name, content in files.items():
        np.savez(folder / f"{name}.npz", **content)
    torch.save(nn.Linear(7, 10).state_dict(), folder / "linear.pt")
    (folder / "linear_of_theirs.py").write_text("from torch import nn\n\ndef made():\n    return nn.Linear(7, 10)\n")
    with open(folder / "harmful.pt", "wb") as file:
        pickle.dump({"state_dict": Harmful()}, file)
    data, npz = ["--data", "digits"], ["--data", "npz", "--data-path"]
    return {
        "images in 0..255": (["theirs.pt", *npz, "pixels.npz"], "x: expected numbers in [0, 1], got 255 to 255"),
        "labels of another shape": (["theirs.pt", *npz, "labels.npz"], "y: expected integers of shape (4,)"),
        "empty data": (["theirs.pt", *npz, "empty.npz"], "x: expected shape (N, ...) with at least one number"),
        "classes it lacks": (["theirs.pt", *npz, "classes.npz"], "model: it tells 10 classes apart, and the data have"),
        "inputs of another shape": (
            ["linear.pt", *data, "--model", "linear_of_theirs:made"],
            "model: it does not take inputs of shape (1, 8, 8)",
        ),
        "a pickle with code": (["harmful.pt", *data], "model: harmful.pt: "),
        "no file": (["none.pt", *data], "run: expected the file of a checkpoint beside --model, got 'none.pt'"),
        "no data": (["theirs.pt"], "cifar100, svhn, parquet, folder, tiny-imagenet, npz beside --model, got none"),
        "a path for the digits": (
            ["theirs.pt", *data, "--data-path", "x"],
            "data_path: the digits are bundled, expected none, got 'x'",
        ),
        "an eps in 0 ... 255": (["theirs.pt", *data, "--eps", "8"], "eps: pixels lie in [0, 1], expected at most 1"),
        "a file in the way": (["theirs.pt", *data, "--out", "theirs.pt/x"], "out: expected a folder, got 'theirs.pt/x"),
        "no path": (["theirs.pt", "--data", "cifar10"], "data_path: expected where the data are"),
        "missing archive": (["theirs.pt", "--data", "cifar10", "--data-path", "none"], "data_path: "),
        "validation split": (["theirs.pt", *data, "--split", "validation"], "split: expected one of test, train"),
        "another network": (["theirs.pt", *data, "--model", "small-cnn-8"], "model: theirs.pt: "),
        "no such network": (["theirs.pt", *data, "--model", "resnet-50"], "got 'resnet-50'"),
        "eps 0": (["theirs.pt", *data, "--eps", "0"], "eps: input should be greater than 0, got 0"),
        "eps negative": (["theirs.pt", *data, "--eps", "-1"], "eps: input should be greater than 0, got -1"),
        "PGD in L1": (["theirs.pt", *data, "--norm", "L1", "--attacks", "pgd-2"], "attacks: pgd-2: "),
        "weights too": (["theirs.pt", *data, "--weights", "x.safetensors"], "weights: expected none beside --model"),
    }


NAMES = [
    "images in 0..255", "labels of another shape", "empty data", "classes it lacks", "inputs of another shape",
    "a pickle with code", "no file", "no data", "a path for the digits", "an eps in 0 ... 255", "a file in the way",
    "no path", "missing archive", "validation split", "another network",
    "no such network", "eps 0", "eps negative", "PGD in L1", "weights too",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(name, foreign, monkeypatch, capsys):
    _, folder = foreign
    monkeypatch.chdir(folder)
    words, line = bad_foreign(folder)[name]
    before = sorted(folder.rglob("*"))
    defaults = {"--model": "small-cnn-4", "--eps": "0.1"}
    more = [word for option, value in defaults.items() if option not in words for word in (option, value)]
    with pytest.raises(SystemExit) as stop:
        run("evaluate", *words, *more)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert line in printed.err
    assert printed.err.startswith("saltflat: ")
    assert printed.err.count("\n") == 1
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before


def test_bad_input_cases_are_all_run(foreign):
    assert list(bad_foreign(foreign[1])) == NAMES


def test_what_belongs_to_others_is_refused_for_a_run(trained, capsys):
    for words, line in (
        (["--data", "digits"], "data: goes with --model"),
        (["--mean", "0.5"], "mean: goes with --model"),
        (["--out", "x"], "out: goes with --model"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("evaluate", trained, *words)
        assert stop.value.code == 2
        assert line in capsys.readouterr().err


def test_an_export_loads_again_and_carries_its_outcomes(fresh, tmp_path, capsys):
    run("evaluate", fresh, "--examples", "20", "--attacks", "clean", "pgd-2")
    run("export", fresh, "--out", tmp_path / "hub", "--title", "Ours", "--licence", "mit")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    model = published.load(tmp_path / "hub" / "model.safetensors", **config)
    of, x = subjects.from_run(fresh, "best", "cpu"), to_float(digits().test.images[:9])
    with torch.no_grad():
        assert torch.allclose(model(x), of.model(x), atol=1e-6)
    assert {path.suffix for path in (tmp_path / "hub" / "outcomes").iterdir()} == {".npz", ".json"}
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "# Ours" in card
    assert "| pgd-2 |" in card
    assert "no RobustBench entry: it has no digits" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run("export", fresh, "--out", tmp_path / "hub")
    assert stop.value.code == 2
    assert "out: expected a folder that is new or empty" in capsys.readouterr().err


def test_only_finished_evaluations_of_these_weights_and_this_threat_are_exported(fresh, tmp_path):
    run("evaluate", fresh, "--examples", "20", "--attacks", "clean")
    run("evaluate", fresh, "--examples", "20", "--attacks", "clean", "fgsm", "--eps", "0.01")
    run("evaluate", fresh, "--examples", "20", "--attacks", "clean", "fgsm", "--checkpoint", "last")
    run("export", fresh, "--out", tmp_path / "hub")
    kept = list((tmp_path / "hub" / "outcomes").glob("*.json"))
    assert [json.loads(path.read_text())["threat"]["eps"] for path in kept] == [0.15]


def test_of_two_attacks_of_one_name_the_stronger_is_exported(fresh, tmp_path):
    for step in ("0.05", "0.0000001"):
        run("evaluate", fresh, "--examples", "100", "--attacks", "clean", "pgd-2", "--step-size", step)
    summaries = [json.loads(path.read_text()) for path in (fresh / "outcomes").glob("*.json")]
    left = [row["accuracy"] for summary in summaries for row in summary["attacks"] if row["name"] == "pgd-2"]
    assert len(set(left)) == 2
    run("export", fresh, "--out", tmp_path / "hub")
    assert f"| pgd-2 | {100 * min(left):.2f} |" in (tmp_path / "hub" / "README.md").read_text()


def test_another_network_for_the_same_weights_is_another_question(foreign, monkeypatch, capsys):
    _, folder = foreign
    monkeypatch.chdir(folder)
    words = [
        "evaluate",
        "theirs.pt",
        "--model",
        "small-cnn-4",
        "--eps",
        "0.1",
        "--attacks",
        "clean",
        "--data",
        "digits",
    ]
    for more in ([], ["--mean", "0.9", "--std", "0.01"], ["--mean", "0.9", "--std", "0.01"]):
        capsys.readouterr()
        run(*words, "--examples", "50", *more)
    assert "already there" in capsys.readouterr().out
    summaries = [json.loads(path.read_text()) for path in folder.glob("evaluations/theirs/outcomes/*.json")]
    assert {summary["network"] for summary in summaries} == {"small-cnn-4", "small-cnn-4, mean (0.9,), std (0.01,)"}


def test_other_images_with_the_same_labels_are_another_question(foreign, monkeypatch, capsys):
    _, folder = foreign
    monkeypatch.chdir(folder)
    with np.load("mine.npz") as mine:
        np.savez("inverted.npz", x=1 - mine["x"], y=mine["y"])
    words = ["evaluate", "theirs.pt", "--model", "small-cnn-4", "--eps", "0.1", "--attacks", "clean", "--data", "npz"]
    for name in ("mine", "inverted"):
        run(*words, "--data-path", f"{name}.npz")
    assert "already there" not in capsys.readouterr().out
    run(*words, "--data-path", "mine.npz")
    assert "already there" in capsys.readouterr().out


def test_weights_that_are_replaced_while_they_are_read_are_read_again(fresh, monkeypatch):
    """What is on record is the digest of those that were measured."""
    best, last = (fresh / "checkpoints" / f"{name}.safetensors" for name in ("best", "last"))
    load, calls = subjects.checkpoints.load_weights, []

    def replaced(file, model):
        load(file, model)
        calls.append(file)
        if len(calls) == 1:
            best.write_bytes(last.read_bytes())

    monkeypatch.setattr(subjects.checkpoints, "load_weights", replaced)
    of = subjects.from_run(fresh, "best", "cpu")
    assert len(calls) == 2
    assert of.sha256 == subjects.checkpoints.digest(last)
    for name, w in load_file(last).items():
        assert torch.equal(of.model.state_dict()[name], w)


def test_where_it_stands_is_said_in_words():
    columns = [suite.standard(subjects.Threat("Linf", 0.1, 0.1).ball)]
    verdicts = {"standard": suite.Verdicts(torch.full((5,), -1), torch.full((5,), -1), torch.zeros(5))}
    words = [evaluations._where(columns, suite.Done(verdicts, 0, k, 1, 4, 0, 0)) for k in (0, 1, 4, 20)]
    assert words == [
        "clean: 4 of 5 are right",
        "standard: apgd-ce, 4 survive",
        "standard: apgd-t 3/9, 4 survive",
        "standard: square, 4 survive",
    ]


def test_a_chain_is_followed_by_a_look_at_plain_pgd_which_is_told(fresh, capsys, monkeypatch):
    monkeypatch.setattr(evaluations.checks, "LONG", 2)
    run("evaluate", fresh, "--examples", "8", "--attacks", "fgsm+pgd-2")
    assert "last, whether plain PGD had converged: longer runs on 8 examples\n" in capsys.readouterr().out
    run("evaluate", fresh, "--examples", "8", "--attacks", "fgsm", "pgd-2")
    assert "plain PGD" not in capsys.readouterr().out
