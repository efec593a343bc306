"""Downloads, labels, extra images, weights to begin with, and recipes side by side, as a person types them."""

import json
import shutil

import numpy as np
import pytest
import torch
from commands import QUICK, run
from networks import equal_states
from safetensors.torch import load_file

from saltflat.data import digits
from saltflat.data.download import Source
from saltflat.lab import build, downloads, initial, record
from saltflat.lab.checkpoints import load_weights, newest_whole, save_state, states
from saltflat.lab.config import BadInput
from saltflat.lab.recipes import RECIPES
from saltflat.lab.study.compare import changed, configs


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "at"
    run("train", "at", *QUICK, "--out", out)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "unlabelled.npz"
    np.savez(path, image=digits().train.images[:50].permute(0, 2, 3, 1).numpy())
    return path


def test_labels_are_those_of_the_network(trained, images, tmp_path):
    out = tmp_path / "labelled.npz"
    run("label", trained, images, "--out", out, "--checkpoint", "last", "--batch-size", "7")
    found = np.load(out)
    config = record.read_config(trained)
    model = build.network(config, digits().train).eval()
    load_weights(trained / "checkpoints" / "last.safetensors", model)
    with torch.no_grad():
        expected = model(digits().train.images[:50] / 255).argmax(1)
    assert found["label"].tolist() == expected.tolist()
    assert np.array_equal(found["image"], np.load(images)["image"])


def test_labelling_refuses_what_it_cannot_use(trained, images, tmp_path, capsys):
    there = tmp_path / "there.npz"
    there.write_text("mine")
    assert "out: expected a file that does not exist" in refused(capsys, "label", trained, images, "--out", there)
    assert there.read_text() == "mine"
    other = tmp_path / "other.npz"
    np.savez(other, image=np.zeros((4, 9, 9, 1), np.uint8))
    words = refused(capsys, "label", trained, other, "--out", tmp_path / "new.npz")
    assert "images: expected shape (1, 8, 8), as the network was trained on, got (1, 9, 9)" in words
    cut = tmp_path / "cut.npz"
    cut.write_bytes(images.read_bytes()[:100])
    assert "images: " in refused(capsys, "label", trained, cut, "--out", tmp_path / "new.npz")
    assert "ends in .npz" in refused(capsys, "label", trained, images, "--out", tmp_path / "new.txt")
    assert not (tmp_path / "new.npz").exists()


def test_self_training_in_three_commands(trained, images, tmp_path):
    labelled = tmp_path / "labelled.npz"
    run("label", trained, images, "--out", labelled)
    run("train", "rst-awp", *QUICK, "--extra.path", labelled, "--out", tmp_path / "rst")
    shutil.move(labelled, tmp_path / "elsewhere.npz")  # what was trained is measured without it
    run("evaluate", tmp_path / "rst", "--examples", "20", "--attacks", "clean")
    assert [line["epoch"] for line in record.read_metrics(tmp_path / "rst")] == [1, 2]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": np.zeros((4, 9, 9, 1), np.uint8), "label": np.zeros(4, np.int64)}, "extra.path: "),
        ({"image": np.zeros((4, 8, 8, 3), np.uint8), "label": np.zeros(4, np.int64)}, "extra.path: "),
        ({"image": np.zeros((4, 8, 8, 1), np.uint8), "label": np.full(4, 10)}, "extra.path: "),
        ({"image": np.zeros((4, 8, 8, 1), np.uint8)}, "extra.path: "),
    ],
    ids=["size", "channels", "classes", "no labels"],
)
def test_extra_images_that_do_not_fit_are_refused_before_work(arrays, words, tmp_path, capsys):
    path, out = tmp_path / "extra.npz", tmp_path / "run"
    np.savez(path, **arrays)
    assert words in refused(capsys, "train", "rst", *QUICK, "--extra.path", path, "--out", out)
    assert not out.exists()


def test_training_begins_with_the_weights_of_a_checkpoint_and_goes_on_without_it(trained, tmp_path, capsys):
    file = tmp_path / "begin.safetensors"
    shutil.copy(trained / "checkpoints" / "last.safetensors", file)
    out = tmp_path / "tuned"
    run("train", "at", *QUICK, "--model.initial", file, "--out", out)
    config = record.read_config(out)
    begun = initial.begun(config, digits().train)
    expected = build.network(config, digits().train)
    load_weights(file, expected)
    assert equal_states(begun.state_dict(), expected.state_dict())
    file.unlink()
    run("train", "--resume", out)
    assert "is finished" in capsys.readouterr().out
    wrong = refused(capsys, "train", "at", *QUICK, "--model.width", "5", "--model.initial", out / "nothing.pt")
    assert "model.initial: " in wrong
    other = out / "checkpoints" / "last.safetensors"
    wrong = refused(capsys, "train", "at", *QUICK, "--model.width", "5", "--model.initial", other)
    assert "another architecture" in wrong


def test_a_last_layer_for_another_number_of_classes_is_drawn_anew(trained):
    config = record.read_config(trained)
    config = changed(config, [f"model.initial={trained / 'checkpoints' / 'last.safetensors'}"])
    read = digits().train
    fewer = type(read)(read.images[read.labels < 4], read.labels[read.labels < 4], 4, "few")
    begun, drawn = initial.begun(config, fewer).state_dict(), build.network(config, fewer).state_dict()
    old = initial.begun(config, read).state_dict()
    head = [name for name in begun if begun[name].shape != old[name].shape]
    assert len(head) == 2
    for name in begun:
        assert torch.equal(begun[name], drawn[name] if name in head else old[name])


@pytest.mark.slow
def test_recipes_side_by_side(tmp_path, capsys):
    sets = [
        "data.examples=60", "data.validation_examples=20", "optimizer.epochs=1", "model.width=4", "attack.eps=8/255",
        "evaluation.examples=30", "attack.steps=2", "evaluation.steps=2", "threads=1",
    ]  # fmt: skip
    command = [
        "study",
        "compare",
        "fast-at",
        "free-at-awp",
        "--set",
        *sets,
        "--seeds",
        "2",
        "--attacks",
        "clean",
        "fgsm",
    ]
    run(*command, "--examples", "30", "--out", tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "fast-at-seed0", "fast-at-seed1", "free-at-awp-seed0", "free-at-awp-seed1", "logs", "report.html",
    }  # fmt: skip
    for folder in (tmp_path / "c").glob("*-seed?"):
        config = record.read_config(folder)
        assert (config.attack.eps, config.optimizer.epochs) == (8 / 255, 1)
        assert {json.loads(path.read_text())["checkpoint"] for path in (folder / "outcomes").glob("*.json")} == {
            "best",
            "last",
        }
    weights = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*.safetensors")}
    run(*command, "--examples", "30", "--out", tmp_path / "c")
    assert weights == {path: path.read_bytes() for path in (tmp_path / "c").rglob("*.safetensors")}
    other = [*command[:4], "--set", "optimizer.epochs=2", "--seeds", "1", "--out", tmp_path / "c"]
    assert "is a run of another config" in refused(capsys, *other)
    assert "threads: 1" in (tmp_path / "c" / "fast-at-seed0" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("recipes", "changes", "words"),
    [
        (["at", "nothing"], [], "recipes: expected names that"),
        (["at", "at"], [], "recipes: expected each once, got 'at' again"),
        (["at"], ["optimizer.epochs"], "set: expected FIELD=VALUE"),
        (["at"], ["optimizer.epoch=2"], "set: expected the name of a recipe's field"),
        (["at"], ["optimizer.epochs.more=2"], "set: expected the name of a recipe's field"),
        (["at"], ["seed=2"], "set: expected the name of a recipe's field"),
        (["at"], ["optimizer.epochs=[1"], "set: expected a value for optimizer.epochs"),
        (["at"], ["optimizer.epochs=none"], "optimizer.epochs: "),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(recipes, changes, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        configs(recipes, changes, 1, tmp_path)


def test_changes_take_fractions_and_paths():
    config = changed(RECIPES["cifar10-generated"], ["data.path=x.tar.gz", "attack.eps=4/255", "extra.path=1m.npz"])
    assert (str(config.data.path), config.attack.eps, str(config.extra.path)) == ("x.tar.gz", 4 / 255, "1m.npz")


def test_downloads_end_in_one_line(tmp_path, monkeypatch, capsys):
    there = tmp_path / "hello.txt"
    there.write_text("hello")
    good = Source("greeting", "http://127.0.0.1:9/hello", "hello.txt", "5d41402abc4b2a76b9719d911017c592")
    monkeypatch.setattr(downloads, "SOURCES", {"cifar10": (good,)})
    run("download", "cifar10", "--out", tmp_path)
    assert f"greeting: {there}" in capsys.readouterr().out
    there.write_text("altered")
    words = refused(capsys, "download", "cifar10", "--out", tmp_path)
    assert "hello.txt" in words
    assert there.read_text() == "altered"
    there.unlink()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(SystemExit) as stop:
        run("download", "cifar10", "--out", tmp_path)
    assert stop.value.code == 1
    offline = capsys.readouterr().err
    assert "http://127.0.0.1:9/hello" in offline
    assert offline.count("\n") == 1
    assert "name: expected one of cifar10" in refused(capsys, "download", "imagenet", "--out", tmp_path)
    assert "`saltflat download cifar10` fetches it" in refused(capsys, "train", "cifar10-at")


def test_svhn_s_extra_images_join_svhn_and_nothing_else(tmp_path, capsys):
    io = pytest.importorskip("scipy.io")
    for split, n in (("train", 40), ("test", 20), ("extra", 30)):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, n), np.uint8)
        content = {"X": pixels, "y": (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]}
        io.savemat(tmp_path / f"{split}_32x32.mat", content, do_compression=True)
    quick = [
        "--data.validation-examples", "10", "--optimizer.epochs", "1", "--model.name", "mlp", "--model.width", "4",
        "--attack.steps", "1", "--evaluation.steps", "1", "--evaluation.examples", "20", "--threads", "1",
        "--optimizer.batch-size", "8", "--extra.path", tmp_path, "--extra.share", "0.5",
    ]  # fmt: skip
    run("train", "svhn-at-awp", "--data.path", tmp_path, *quick, "--awp.warmup", "0", "--out", tmp_path / "run")
    assert record.read_metrics(tmp_path / "run")[0]["step"] == 4  # as many as without: 30 images, 8 a batch
    wrong = refused(capsys, "train", "at", *QUICK, "--extra.path", tmp_path, "--extra.share", "0.5")
    assert "extra.path: " in wrong
    assert "expected images and classes as digits" in wrong


def test_natural_training_keeps_the_epoch_with_the_best_clean_accuracy(tmp_path):
    run("train", "at", *QUICK, "--objective.name", "natural", "--optimizer.epochs", "4", "--out", tmp_path / "run")
    lines = record.read_metrics(tmp_path / "run")
    clean = [line["validation"]["clean_accuracy"] for line in lines]
    assert [line["best"] for line in lines] == [accuracy > max([-1.0, *clean[:i]]) for i, accuracy in enumerate(clean)]


def test_what_measures_takes_steps_of_a_quarter_of_eps_at_most(tmp_path):
    run("train", "fast-at", *QUICK, "--attack.steps", "1", "--out", tmp_path / "run")
    assert "step 0.0375" in (tmp_path / "run" / "evaluation.json").read_text()


def test_other_extra_images_are_not_gone_on_with(images, tmp_path, capsys):
    """Nor is anything said of a file that was moved."""
    extra = tmp_path / "extra.npz"
    pixels = np.load(images)["image"]
    np.savez(extra, image=pixels, label=np.arange(len(pixels)) % 10)
    run("train", "rst", *QUICK, "--optimizer.epochs", "1", "--extra.path", extra, "--out", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    kept = tmp_path / "run" / "checkpoints"
    _, state = newest_whole(kept, pytest.fail)
    save_state(kept, {**state, "epoch": 0, "step": state["step"] + 1, "metrics": []})  # as if there was more to do
    np.savez(extra, image=pixels, label=np.arange(len(pixels)) % 9)
    assert "(or what extra.path holds) was changed" in refused(capsys, "train", "--resume", tmp_path / "run")
    np.savez(tmp_path / "moved.npz", image=pixels, label=np.arange(len(pixels)) % 10)
    extra.unlink()
    config.write_text(config.read_text().replace(str(extra), str(tmp_path / "moved.npz")))
    run("train", "--resume", tmp_path / "run")
    assert [line["epoch"] for line in record.read_metrics(tmp_path / "run")] == [1]


def test_a_finished_run_of_another_version_is_finished(trained, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    _, state = newest_whole(old / "checkpoints", pytest.fail)
    for path in states(old / "checkpoints"):
        path.unlink()
    del state["ranks"], state["before"]
    torch.save(state, old / "checkpoints" / "resume.pt")
    run("train", "--resume", old)
    assert "is finished: 2 epochs" in capsys.readouterr().out
    torch.save({**state, "epoch": 1}, old / "checkpoints" / "resume.pt")
    words = refused(capsys, "train", "--resume", old)
    assert "has no checkpoint to go on from" in words
    assert "but one of an earlier version; begin a new run" in words
    (old / "checkpoints" / "resume.pt").unlink()
    save_state(old / "checkpoints", {**state, "epoch": 1})  # a field less than this version has
    assert "perhaps another version wrote it" in refused(capsys, "train", "--resume", old)


def test_a_comparison_looks_at_everything_before_it_trains_anything(tmp_path, capsys):
    out = tmp_path / "c"
    words = refused(capsys, "study", "compare", "at", "--examples", "100000", "--out", out)
    assert "examples: expected at most the 597 test examples, got 100000" in words
    words = refused(
        capsys, "study", "compare", "at", "rst", "--set", "data.examples=60", "--out", out
    )  # rst has no images
    assert "extra.path: " in words
    assert not out.exists()
    assert "set: expected each field once, got optimizer.epochs again" in refused(
        capsys, "study", "compare", "at", "--set", "optimizer.epochs=1", "optimizer.epochs=2", "--out", out
    )


def test_changes_are_spelled_as_on_the_command_line():
    assert changed(RECIPES["at"], ["optimizer.learning-rate=0.2"]).optimizer.learning_rate == 0.2
    assert str(changed(RECIPES["cifar10-at"], ["data.path=12"]).data.path) == "12"


def test_weights_to_begin_with_are_looked_at(trained, tmp_path, capsys):
    file = tmp_path / "nan.pt"
    state = load_file(trained / "checkpoints" / "last.safetensors")
    torch.save({name: tensor * torch.nan for name, tensor in state.items()}, file)
    words = refused(capsys, "train", "at", *QUICK, "--model.initial", file, "--out", tmp_path / "run")
    assert "expected finite weights" in words
    own = trained / "checkpoints" / "last.safetensors"
    words = refused(
        capsys, "train", "at", *QUICK, "--model.mean", "0.5", "--model.initial", own, "--out", tmp_path / "r"
    )
    assert "normalises by model.mean [0.3] and model.std [0.38]; set them" in words
    assert not (tmp_path / "run").exists()


def test_flatness_from_where_training_began_needs_no_file_of_others(trained, tmp_path):
    file = tmp_path / "begin.safetensors"
    shutil.copy(trained / "checkpoints" / "last.safetensors", file)
    run("train", "at", *QUICK, "--model.initial", file, "--out", tmp_path / "tuned")
    file.unlink()
    run("flatness", tmp_path / "tuned", "--measures", "norms", "--examples", "20")


def test_what_a_network_was_trained_on_is_what_it_can_be_evaluated_on(trained, tmp_path):
    read = digits()
    arrays = {"x_train": read.train, "x_test": read.test}
    labels = {"y_train": read.train.labels[:40].numpy(), "y_test": read.test.labels[:40].numpy()}
    np.savez(tmp_path / "own.npz", **{k: v.images[:40].numpy() for k, v in arrays.items()}, **labels)
    theirs = shutil.copy(trained / "checkpoints" / "last.safetensors", tmp_path / "theirs.safetensors")
    command = ["evaluate", theirs, "--model", "small-cnn-4", "--data", "npz", "--data-path", tmp_path / "own.npz"]
    out = tmp_path / "out"
    run(*command, "--mean", "0.3", "--std", "0.38", "--eps", "0.1", "--attacks", "clean", "--out", out)
    (summary,) = (json.loads(path.read_text()) for path in (out / "outcomes").glob("*.json"))
    assert (summary["split"], summary["n"]) == ("test", 40)


def test_what_was_chosen_for_the_digits_is_named_where_the_data_are_others(tmp_path, capsys):
    mine = digits()
    arrays = {
        f"{kind}_{split}": getattr(getattr(mine, split), of).numpy()
        for split in ("train", "test")
        for kind, of in (("x", "images"), ("y", "labels"))
    }
    np.savez(tmp_path / "mine.npz", **arrays)
    words = ["--data.name", "npz", "--data.path", tmp_path / "mine.npz", "--attack.eps", "0.1"]
    run("train", "at", *QUICK, *words, "--out", tmp_path / "run")
    (note,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    assert note.startswith("note: chosen for the digits, and not changed with the data: ")
    assert "model.mean 0.3" in note
    assert "attack.eps" not in note

    run("train", "at", *QUICK, "--out", tmp_path / "digits")
    assert "note:" not in capsys.readouterr().out
