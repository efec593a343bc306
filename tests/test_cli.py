"""The commands, as a person types them."""

import ast
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import QUICK, run
from PIL import Image

import saltflat
from saltflat.lab import build, checkpoints, config, console, initial, record, subjects, trainings
from saltflat.lab.cli import main, parsed
from saltflat.lab.recipes import RECIPES
from saltflat.lab.threat import Threat
from saltflat.train import Epoch, fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folders = []
    for recipe in ("at", "at-awp"):
        folders.append(tmp_path_factory.mktemp("runs") / recipe)
        run("train", recipe, *QUICK, "--out", folders[-1])
    return folders


def test_train_evaluate_landscape_report(trained, tmp_path, capsys):
    at, awp = trained
    states = checkpoints.states(at / "checkpoints")
    assert [path.name.split("-")[1] for path in states] == ["4", "2"]  # steps: two an epoch
    assert {path.name for path in (at / "checkpoints").iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        *(path.name for path in states),
    }
    assert [line["epoch"] for line in record.read_metrics(at)] == [1, 2]
    assert [line["gamma"] for line in record.read_metrics(awp)] == [0.01, 0.01]

    run("evaluate", at, "--examples", "40", "--attacks", "clean", "pgd-3", "cw-3", "fgsm")
    threat = ("--eps", "4/255", "--step-size", "1/255", "--norm", "L2")
    run("evaluate", at / "checkpoints" / "last.safetensors", "--examples", "40", *threat)
    summaries = [json.loads(path.read_text()) for path in (at / "outcomes").glob("*.json")]
    assert {summary["checkpoint"] for summary in summaries} == {"best", "last"}
    assert any("L2, eps 4/255" in row["description"] for summary in summaries for row in summary["attacks"])
    for summary in summaries:
        found = np.load(next((at / "outcomes").glob(f"{summary['checkpoint']}-*.npz")))
        for row in summary["attacks"]:
            assert (found[f"{row['name']}_by"] == -1).mean() == pytest.approx(row["accuracy"])
            assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]

    run("landscape", at, awp, "--points", "3", "--examples", "20", "--directions", "2", "--steps", "2")
    found = json.loads(next((awp / "landscapes").glob("*.json")).read_text())
    assert found["alphas"] == [-1.0, 0.0, 1.0]
    assert [curve["direction_seed"] for curve in found["curves"]] == [0, 1]
    run("report", at, awp, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "at-awp" in page
    assert "<svg" in page
    assert "95 % interval" in capsys.readouterr().out


def test_equal_commands_end_with_equal_files(trained, tmp_path):
    run("train", "at-awp", *QUICK, "--out", tmp_path / "again")
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "again/checkpoints" / name).read_bytes() == (trained[1] / "checkpoints" / name).read_bytes()


def test_going_on_with_a_finished_run_changes_nothing(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained[0].rglob("*")}
    run("train", "--resume", trained[0])
    assert "is finished: 2 epochs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in trained[0].rglob("*")} == before


def test_the_version_is_told(capsys):
    run("--version")
    assert capsys.readouterr().out == f"saltflat {saltflat.__version__}\n"


def test_every_recipe_is_listed(capsys):
    run("recipes")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)


def test_recipes_are_listed_by_parts_of_their_names(capsys):
    run("recipes", "cifar10", "trades")
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [name for name in RECIPES if "cifar10" in name and "trades" in name]
    assert listed


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, format="TIFF" if image.mode == "F" else "PNG")
    return buffer.getvalue()


def parquet_of(folder: Path, images: list[bytes], labels: list[int]) -> Path:
    folder.mkdir()
    table = pa.table(
        {"img": [{"bytes": image, "path": None} for image in images], "label": pa.array(labels, pa.int64())}
    )
    for split in ("train", "test"):
        pa.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """name -> (arguments, what the line must hold)"""
    picture = encoded(Image.fromarray(np.zeros((4, 4, 3), np.uint8)))
    nan = encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)))
    nan_images = parquet_of(folder / "nan", [nan] * 4, [0, 1, 0, 1])
    bad_labels = parquet_of(folder / "labels", [picture] * 4, [0, 1, -1, 1])
    (folder / "corrupt.tar.gz").write_bytes(b"\x1f\x8b\x08 not an archive")
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("years of work")
    train = ["train", "at", "--out", str(folder / "new")]
    data = [*train, "--data.validation-examples", "1", "--data.name"]
    return {
        "unknown command": (["trian"], "got 'trian'; perhaps you meant train"),
        "unknown study": (["study", "clams"], "got 'clams'; perhaps you meant claims"),
        "no such recipes": (["recipes", "imagenet"], "words: expected parts of a recipe's name"),
        "unknown recipe": (["train", "att"], "got 'att'; perhaps you meant at"),
        "no recipe but its adversary": (
            ["train", "awp"],
            "recipe: expected a name that `saltflat recipes` lists, got 'awp'",
        ),
        "no recipe": (["train"], "recipe: expected a name that `saltflat recipes` lists, got none"),
        "unknown field": ([*train, "--awp.gama", "1"], "perhaps you meant --awp.gamma"),
        "negative gamma": (
            [*train, "--awp.gamma", "-1"],
            "awp.gamma: input should be greater than or equal to 0, got -1",
        ),
        "eps in words": (
            [*train, "--attack.eps", "lots"],
            "attack.eps: 'lots' is not a number or a fraction such as 8/255",
        ),
        "batch 0": (
            [*train, "--optimizer.batch-size", "0"],
            "optimizer.batch_size: input should be greater than or equal to 1, got 0",
        ),
        "precision of no kind": ([*train, "--compute.precision", "fp8"], "'--compute.precision'. Expected one of"),
        "every 0th step": (
            [*train, "--awp.every", "0"],
            "awp.every: input should be greater than or equal to 1, got 0",
        ),
        "amortised nothing": ([*train, "--awp.amortised"], "awp.amortised: needs awp.gamma > 0, got true"),
        "seed in words": ([*train, "--seed", "x"], "seed: expected a whole number, got 'x'"),
        "unknown norm": ([*train, "--attack.norm", "L3"], "'--attack.norm'. Expected one of ('Linf', 'L2')"),
        "value missing": ([*train, "--seed"], "--seed"),
        "device that is not there": ([*train, "--device", "cuda:99"], "device: expected auto or one of cpu"),
        "folder that exists": (
            ["train", "at", "--out", str(folder / "taken")],
            "out: expected a folder that does not exist yet",
        ),
        "missing archive": ([*data, "cifar10", "--data.path", str(folder / "none.tar.gz")], "data.path: "),
        "no archive": ([*data, "cifar10"], "data.path: expected the archive or folder of cifar10, got none"),
        "corrupt archive": ([*data, "cifar10", "--data.path", str(folder / "corrupt.tar.gz")], "data.path: "),
        "NaN image": ([*data, "parquet", "--data.path", str(nan_images)], "data.path: "),
        "label out of range": ([*data, "parquet", "--data.path", str(bad_labels)], "data.path: "),
        "too few images": (
            [*train, "--data.validation-examples", "5000"],
            "data.validation_examples: expected fewer than the 1200",
        ),
        "run that is none": (["evaluate", str(folder / "taken")], "run: expected a run folder with a config.yaml"),
        "resume of nothing": (
            ["train", "--resume", str(folder / "nowhere")],
            "run: expected a run folder with a config.yaml",
        ),
        "report on nothing": (["report"], "runs: expected at least 1, got none"),
        "report on no run": (["report", str(folder / "taken")], str(folder / "taken")),
        "eps in 255ths": (
            [*train, "--attack.eps", "8"],
            "attack.eps: pixels lie in [0, 1], expected at most 1 (as in 8/255)",
        ),
        "too many threads": ([*train, "--threads", "9999"], "threads: expected at most this machine's"),
        "one image for BatchNorm": (
            [*train, "--model.name", "small-resnet", "--data.examples", "61", "--optimizer.batch-size", "20"],
            "optimizer.batch_size: 61 images in batches of 20 leave one of a single image",
        ),
        "device of another kind": ([*train, "--device", "meta"], "device: expected auto or one of cpu"),
        "even points": (
            ["landscape", str(folder), "--points", "4"],
            "points: expected an odd number >= 3, and at most 9999, got 4",
        ),
        "unknown split": (["evaluate", str(folder), "--split", "tset"], "'--split'. Expected one of"),
    }


NAMES = [
    "unknown command",
    "unknown study",
    "no such recipes",
    "unknown recipe",
    "no recipe but its adversary",
    "no recipe",
    "unknown field",
    "negative gamma",
    "eps in words",
    "batch 0",
    "precision of no kind",
    "every 0th step",
    "amortised nothing",
    "seed in words",
    "unknown norm",
    "value missing",
    "device that is not there",
    "folder that exists",
    "missing archive",
    "no archive",
    "corrupt archive",
    "NaN image",
    "label out of range",
    "too few images",
    "run that is none",
    "resume of nothing",
    "report on nothing",
    "report on no run",
    "eps in 255ths",
    "too many threads",
    "one image for BatchNorm",
    "device of another kind",
    "even points",
    "unknown split",
]


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, words = bad_inputs(tmp_path)[name]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert words in printed.err
    assert printed.err.startswith("saltflat: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_cases_are_all_run(tmp_path):
    assert list(bad_inputs(tmp_path)) == NAMES


def test_a_checkpoint_of_another_architecture_is_refused(trained, tmp_path, capsys):
    run("train", "at", *QUICK, "--model.name", "mlp", "--out", tmp_path / "mlp")
    capsys.readouterr()
    for arguments, words in (
        (
            ["evaluate", trained[0], "--weights", tmp_path / "mlp/checkpoints/last.safetensors"],
            "of another architecture",
        ),
        (["evaluate", trained[0], "--checkpoint", "first"], "checkpoint: expected one of best, last"),
        (["evaluate", trained[0], "--attacks", "pgd"], "attacks: expected clean, fgsm, pgd-K[xR], cw-K[xR]"),
        (["evaluate", trained[0], "--norm", "L2"], "norm: another norm than the run's Linf needs its own --eps"),
        (
            ["evaluate", trained[0], "--batch-size", "0"],
            "batch_size: input should be greater than or equal to 1, got 0",
        ),
        (["evaluate", trained[0], "--attacks"], "attacks: expected at least 1, got none"),
        (["landscape", trained[0], "--reach", "nan"], "reach: input should be a finite number"),
        (["landscape", trained[0], "--reach", "1e7"], "reach: input should be less than or equal to 1000000"),
        (["evaluate", trained[0], "--eps", "8"], "eps: pixels lie in [0, 1], expected at most 1 (as in 8/255), got 8"),
        (["evaluate", trained[0], "--out", "q"], "out: goes with --model, a run knows its own; got 'q'"),
        (["landscape", trained[0], "--directions", "0"], "directions: input should be greater than or equal to 1"),
        (["report", trained[0], "--out", tmp_path], "out: expected a file, got the folder"),
        (["demo", "--out", tmp_path, "--seeds", "0"], "seeds: input should be greater than or equal to 1, got 0"),
        (
            ["evaluate", trained[0], "--examples", "9999"],
            "examples: expected at most the 597 of the test split, got 9999",
        ),
        (["landscape", trained[0], trained[1], tmp_path / "none"], "run: expected a run folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        printed = capsys.readouterr().err
        assert stop.value.code == 2
        assert words in printed
        assert printed.count("\n") == 1


def test_attacks_seeds_steps_and_weights_are_told_apart(trained, tmp_path):
    """cw is not pgd, another step size or seed is another attack, and foreign weights never pass as the run's own."""
    run("train", "at", *QUICK, "--seed", "5", "--out", tmp_path / "run")
    outcomes, found = tmp_path / "run" / "outcomes", {}
    commands = {
        "plain": ["--attacks", "pgd-3", "cw-3"],
        "seed": ["--attacks", "pgd-3", "--seed", "1"],
        "step": ["--attacks", "pgd-3", "--step-size", "0.001"],
        "foreign": ["--attacks", "pgd-3", "--weights", trained[0] / "checkpoints" / "last.safetensors"],
    }
    for name, words in commands.items():
        before = set(outcomes.glob("*.npz"))
        run("evaluate", tmp_path / "run", "--examples", "60", "--checkpoint", "last", *words)
        (new,) = set(outcomes.glob("*.npz")) - before
        found[name] = np.load(new)
    margins = [found[name]["pgd-3_margin"] for name in commands] + [found["plain"]["cw-3_margin"]]
    assert len({margin.tobytes() for margin in margins}) == 5
    names = {json.loads(path.read_text())["checkpoint"] for path in outcomes.glob("*.json")}
    assert names == {"last", str(trained[0] / "checkpoints" / "last.safetensors")}


def test_a_question_that_was_answered_is_not_asked_again(trained, capsys):
    words = ("evaluate", trained[1], "--examples", "30", "--attacks", "clean")
    run(*words)
    before = {path: path.stat().st_mtime_ns for path in (trained[1] / "outcomes").iterdir()}
    capsys.readouterr()
    run(*words)
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (trained[1] / "outcomes").iterdir()} == before


def test_the_clean_curve_of_a_landscape_is_clean(trained):
    run("landscape", trained[0], "--points", "3", "--examples", "25", "--steps", "3", "--reach", "0.1")
    all_found = [json.loads(path.read_text()) for path in (trained[0] / "landscapes").glob("*.json")]
    (found,) = [each for each in all_found if each["n"] == 25]
    for curve in found["curves"]:
        assert all(robust > clean for robust, clean in zip(curve["robust_loss"], curve["clean_loss"], strict=True))


def test_a_run_without_its_state_is_not_begun_anew(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run("train", "--resume", tmp_path / "run")
    assert stop.value.code == 2
    assert "has no checkpoint to go on from" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_metrics_of_an_epoch_without_its_state_are_dropped(tmp_path):
    """Killed between the two writes: the epoch is made again, and stands there once."""
    run("train", "at", *QUICK, "--out", tmp_path / "run")
    folder, whole = tmp_path / "run", (tmp_path / "run" / "checkpoints" / "last.safetensors").read_bytes()
    settings = record.read_config(folder)
    ready = trainings._ready(settings, initial.begun)
    training = fit(
        ready.model,
        ready.sets.train,
        ready.sets.measured,
        build.plan(settings, 10),
        build.optimizer(settings, ready.model),
    )
    first = next(event for event in training if isinstance(event, Epoch))
    state = {**first.state, "config": trainings._identity(ready)}
    for kept in checkpoints.states(folder / "checkpoints"):
        kept.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    checkpoints.save_state(folder / "checkpoints", {**state, "metrics": lines[:1]})
    run("train", "--resume", folder)
    assert [line["epoch"] for line in record.read_metrics(folder)] == [1, 2]
    assert (folder / "checkpoints" / "last.safetensors").read_bytes() == whole


def test_a_run_does_not_go_on_under_another_config(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    text = path.read_text().replace("epochs: 2", "epochs: 3").replace("eps: 0.15", "eps: 0.05")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for words, content in (
        ("was changed or damaged since the run began", text),
        ("was changed since the run began", text.partition("\n")[2]),  # without its digest, the checkpoint's is left
    ):
        path.write_text(content)
        with pytest.raises(SystemExit) as stop:
            run("train", "--resume", tmp_path / "run")
        assert stop.value.code == 2
        assert f"config.yaml {words}" in capsys.readouterr().err
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_another_radius_takes_steps_in_proportion(trained):
    of = subjects.from_run(trained[0], "last")
    assert subjects.with_threat(of, None, 0.075, None).threat.step_size == of.threat.step_size / 2
    assert subjects.with_threat(of, None, 0.075, 0.01).threat.step_size == 0.01
    assert subjects.with_threat(of, None, None, None).threat == of.threat
    assert subjects.with_threat(of, "L2", 1.0, None).threat == Threat("L2", 1.0, 0.25)


@pytest.mark.parametrize("theirs", ["weights.pt", "config.yaml"])
def test_a_report_takes_the_place_of_reports_alone(theirs, trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run" / theirs
    path.write_bytes(kept := path.read_bytes() if path.exists() else b"of a person")
    with pytest.raises(SystemExit) as stop:
        run("report", tmp_path / "run", "--out", path)
    assert stop.value.code == 2
    assert f"out: expected a new file, or a page of before, got {str(path)!r}" in capsys.readouterr().err
    assert path.read_bytes() == kept
    for _ in range(2):
        run("report", tmp_path / "run", "--out", tmp_path / "page.html")


def test_a_run_may_be_called_logs(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "logs")
    run("report", tmp_path / "logs")
    assert (tmp_path / "logs" / "report.html").is_file()


@pytest.mark.parametrize("name", ["e\x1b[31mvil", "\udcfe", "a\x07b\u202e"])
def test_names_move_no_cursor(name, capsys):
    console.say(f"report of {name}\n  on two lines")
    printed = capsys.readouterr().out
    assert all(sign.isprintable() or sign == "\n" for sign in printed)
    assert printed.endswith("\n  on two lines\n")


def test_reports_take_what_a_star_catches(trained, tmp_path):
    (trained[0].parent / "report.html").touch()
    run("report", trained[0], trained[0].parent / "report.html", "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()


def test_paths_may_be_odd(trained, tmp_path, monkeypatch, capsys):
    run("train", "at", *QUICK, "--optimizer.epochs", "1", "--out", tmp_path / "a[/red]:smile: b")
    assert "a[/red]:smile: b" in capsys.readouterr().out
    monkeypatch.chdir(trained[0] / "checkpoints")
    run("evaluate", "last.safetensors", "--examples", "20", "--attacks", "clean")
    monkeypatch.chdir(trained[0])
    run("report", ".", f"{trained[1]}/", "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "at-awp", "--help"], ["evaluate", "-h"], []]
)
def test_help_does_not_wait_for_torch(words):
    script = (
        "import sys\nfrom saltflat.lab.cli import main\ntry:\n main(sys.argv[1:])\nfinally:\n"
        " print('torch' in sys.modules, 'matplotlib' in sys.modules, file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert found.returncode == 0
    assert found.stderr.split() == ["False", "False"]
    assert "usage: saltflat" in found.stdout


def test_every_field_says_what_it_is(capsys):
    """A docstring under each field of the config, which the help shows."""
    classes = [node for node in ast.parse(Path(config.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    sections = {node.name: node for node in classes if node.decorator_list and node.name != "Train"}
    values = vars(config.Train()).values()
    assert sections.keys() == {type(value).__name__ for value in values if dataclasses.is_dataclass(value)}
    for node in sections.values():
        fields = [i for i, line in enumerate(node.body) if isinstance(line, ast.AnnAssign)][1:]
        assert fields
        for i in fields:
            assert isinstance(node.body[i + 1], ast.Expr), ast.unparse(node.body[i])
    with pytest.raises(SystemExit) as stop:
        parsed(["train", "cifar10-trades-awp", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--attack.eps", "--awp.gamma", "--optimizer.batch-size", "--data.validation-examples", "--seed"):
        assert option in shown
    assert "in pixel units" in shown


def test_a_plane_and_flatness_end_on_the_page(trained, tmp_path, capsys):
    quick = ("--examples", "20", "--steps", "2", "--out", tmp_path / "page.html")
    run("landscape", *trained, "--dimensions", "2", "--points", "3", *quick)
    names = ("average", "average-frozen", "curvature", "norms")
    less = ("--batch-size", "10", "--draws", "2", "--climbs", "1", "--restarts", "0", "--probes", "6")
    run("flatness", *trained, "--measures", *names, *less, *quick)
    out = capsys.readouterr().out
    assert "rises by" in out
    assert "Hessian trace of conv1.weight" in out
    page = (tmp_path / "page.html").read_text()
    assert "average case, frozen examples" in page
    assert '<script type="application/json"' in page


def test_the_path_of_a_checkpoint_stands_for_its_run(trained, tmp_path):
    path = trained[0] / "checkpoints" / "best.safetensors"
    run("landscape", path, "--points", "3", "--examples", "20", "--steps", "1", "--out", tmp_path / "page.html")
    assert any((trained[0] / "landscapes").glob("best-test-*.json"))


def test_landscapes_and_flatness_of_what_cannot_be_measured_are_refused(trained, tmp_path, capsys):
    other = tmp_path / "other"
    run("train", "at", *QUICK, "--model.width", "5", "--out", other)
    bare = tmp_path / "bare"
    shutil.copytree(trained[0], bare, ignore=shutil.ignore_patterns("*.safetensors", "landscapes"))
    capsys.readouterr()

    def refused(*words):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert f"checkpoint: there is no checkpoint in {bare} yet" in refused("landscape", bare)
    assert "checkpoint: expected one of best, last" in refused("flatness", trained[0], "--checkpoint", "epoch-1")
    assert "expected one architecture on one axis, got conv1.weight" in refused("landscape", trained[0], other)
    assert "points: expected an odd number >= 3, and at most 9999, got 1" in refused(
        "landscape", trained[0], "--points", "1"
    )
    assert "reach" in refused("landscape", trained[0], "--reach", "0")
    directions = ("--directions", "2")
    assert "expected 1 unless" in refused("landscape", trained[0], *directions, "--direction", "adversarial")
    assert "expected 1 unless" in refused("landscape", trained[0], *directions, "--dimensions", "2")
    assert "expected any of average" in refused("flatness", trained[0], "--measures", "flat")
    assert "probes" in refused("flatness", trained[0], "--probes", "5")
    (tmp_path / "file").write_text("")
    for command in ("landscape", "flatness"):
        assert "out: expected a file" in refused(command, trained[0], "--out", tmp_path)
        assert "out: expected a folder" in refused(command, trained[0], "--out", tmp_path / "file" / "page.html")
    assert not (bare / "landscapes").exists()
