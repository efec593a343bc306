"""The command line: `saltflat demo | recipes | download | train | label | evaluate | export | landscape | flatness |
study | report`.

Parsing and doing are apart: each command below only says what to do, as a function without arguments, so that bad
input is one line on stderr and exit code 2 before anything was touched. torch is imported when the doing begins.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
import tyro
from pydantic import Field

from saltflat import __version__
from saltflat.lab.config import BadInput, Count, CountOrZero, Number, Positive, Train, checked, refusal
from saltflat.lab.recipes import RECIPES, described

Job = Callable[[], None]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
RunOrCheckpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT")]
Runs = Annotated[tuple[Path, ...], Field(min_length=1), tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Split = Literal["test", "train", "validation"]

if TYPE_CHECKING:
    Recipe = Train
else:
    Recipe = Annotated[
        tyro.extras.subcommand_type_from_defaults(
            RECIPES, {name: described(config) for name, config in RECIPES.items()}
        ),
        tyro.conf.arg(name=""),
    ]

app, studies = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()


def command(function: Callable[..., Job], of: tyro.extras.SubcommandApp = app) -> Callable[..., Job]:
    """Makes a command of a function, whose arguments are held to what their types say."""
    valid = pydantic.validate_call(config=pydantic.ConfigDict(allow_inf_nan=False))(function)

    @functools.wraps(function)
    def call(*arguments: object, **named: object) -> Job:
        try:
            return valid(*arguments, **named)
        except pydantic.ValidationError as error:
            raise refusal(error) from None

    of.command(call)
    return call


def study_command(function: Callable[..., Job]) -> Callable[..., Job]:
    """The same, for `saltflat study NAME`."""
    return command(function, studies)


@app.command
def train(recipe: Recipe, out: Folder | None = None) -> Job:
    """Train a network by a recipe, or go on with a run: `saltflat train --resume RUN`.

    Args:
        recipe: what to train, and how; every field can be overridden.
        out: folder of the run, which must not exist; default runs/RECIPE-seedN.
    """
    config = checked(recipe)

    def job() -> None:
        from saltflat.lab import trainings

        trainings.train(config, out or Path("runs") / f"{config.recipe}-seed{config.seed}")

    return job


def resume(resume: Folder) -> Job:
    """Go on with a run from its last whole epoch, to end as if it had never stopped.

    Args:
        resume: folder of the run.
    """

    def job() -> None:
        from saltflat.lab import trainings

        trainings.resume(resume)

    return job


@command
def evaluate(
    run: RunOrCheckpoint,
    attacks: Annotated[tuple[str, ...], Field(min_length=1)] = ("clean", "fgsm", "pgd-20", "cw-20"),
    suite: Literal["standard", "fast", "paper"] | None = None,
    checkpoint: str = "best",
    weights: Path | None = None,
    split: Split = "test",
    examples: CountOrZero = 0,
    norm: Literal["Linf", "L2", "L1"] | None = None,
    eps: Positive | None = None,
    step_size: Positive | None = None,
    batch_size: Count = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    padded: bool = False,
    seed: CountOrZero = 0,
    device: str = "auto",
    data_path: Path | None = None,
    model: str | None = None,
    data: str | None = None,
    mean: tuple[Number, ...] = (),
    std: tuple[Positive, ...] = (),
    key: str | None = None,
    out: Folder | None = None,
) -> Job:
    """Attack a network, and write each example's outcome into its run folder; what was interrupted goes on.

    Args:
        run: a run folder, a .safetensors file in one, or, with --model, a checkpoint of others.
        attacks: any of clean, fgsm, pgd-K, cw-K (PGD on the margin; xR restarts, as in pgd-100x10), apgd-ce, apgd-dlr,
            apgd-t, fab-t, square, spsa, standard, fast; A+B gives B only those that survive A.
        suite: in place of attacks: standard (AutoAttack), fast (its APGD-CE and APGD-T alone), or paper (fgsm pgd-20
            pgd-100 cw-100 spsa standard), each with clean.
        checkpoint: best (on validation), or last.
        weights: a .safetensors file to evaluate in place of the run's own.
        split: which images.
        examples: how many of them, stratified; 0 takes all.
        norm: of the threat model; default the run's.
        eps: radius of the threat model, in pixel units; default the run's.
        step_size: of PGD and CW, in pixel units; default the run's, in proportion to eps, or eps / 4.
        batch_size: examples at a time.
        precision: of attacks; whatever looks fooled is asked again in fp32 before it counts.
        padded: give the network batch-size rows always, so that outcomes do not depend on company, to the bit.
        seed: of all that attacks draw.
        device: auto, cpu, cuda, or cuda:N.
        data_path: where the data are; default where the run's were.
        model: of a checkpoint of others: preact-resnet18, wide-resnet-DEPTH-WIDEN, vgg19-bn, or module:factory.
        data: beside --model: digits, cifar10, cifar100, svhn, parquet, folder, tiny-imagenet, or npz (arrays
            x and y).
        mean: beside --model: subtracted from the input, per channel, if the checkpoint's authors kept that outside.
        std: beside --model: what the input is divided by then.
        key: beside --model: where in the file the weights are, if it holds several.
        out: beside --model: folder of the outcomes; default evaluations/CHECKPOINT.
    """
    foreign = {"data": data, "mean": mean, "std": std, "key": key, "out": out}
    if model is None and (given := [name for name, value in foreign.items() if value]):
        raise BadInput(f"{given[0]}: goes with --model, a run knows its own; got {foreign[given[0]]!r}")
    if model is not None and weights is not None:
        raise BadInput(f"weights: expected none beside --model, got {str(weights)!r}")
    if model is not None and eps is None:
        raise BadInput("eps: expected the radius of the threat model beside --model, in pixel units, got none")

    def job() -> None:
        from saltflat.lab import evaluations, subjects, threat

        if model is None:
            found = subjects.from_run(run, checkpoint, device, weights, data_path)
            subject = subjects.with_threat(found, norm, eps, step_size)
        else:
            assert eps is not None
            sys.path.insert(0, "")  # module:factory may lie in the current folder, as for `python -m`
            held = threat.Threat(norm or "Linf", eps, step_size or subjects.STEP * eps)
            about = subjects.Foreign(model, data, data_path, mean, std, key)
            subject = subjects.from_file(run, about, held, device, out or Path("evaluations") / run.stem)
        names = threat.SUITES[suite] if suite else attacks
        how = evaluations.How(batch_size, seed, precision, padded)
        evaluations.show(subject, evaluations.evaluation(subject, names, split, examples, how))

    return job


@command
def export(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Folder,
    checkpoint: str = "best",
    title: str = "",
    licence: str = "unknown",
    name: str = "",
    authors: str = "",
    link: str = "",
    venue: str = "",
    data_path: Path | None = None,
) -> Job:
    """Write a run's network and its evaluations for others: a folder that the Hugging Face hub takes, and a RobustBench
    entry where AutoAttack was run.

    Args:
        run: a run folder.
        out: a folder that is new or empty.
        checkpoint: best (on validation), or last.
        title: of the model card; default the recipe and its seed.
        licence: of the weights, as the hub calls it: mit, apache-2.0, cc-by-4.0.
        name: of the paper, for RobustBench.
        authors: of the paper.
        link: to the paper.
        venue: of the paper.
        data_path: where the run's data are now; default where they were.
    """

    def job() -> None:
        from saltflat.lab import exports

        paper = exports.Paper(name, authors, link, venue)
        exports.export_run(run, checkpoint, out, title=title, licence=licence, paper=paper, data_path=data_path)

    return job


@command
def landscape(
    runs: Runs,
    checkpoint: str = "last",
    dimensions: Literal[1, 2] = 1,
    reach: Positive = 1.0,
    points: Count = 21,
    directions: Count = 1,
    direction: Literal["random", "adversarial"] = "random",
    normalisation: Literal["filter", "layer"] = "filter",
    split: Split = "test",
    examples: CountOrZero = 512,
    steps: Count = 10,
    own_loss: bool = False,
    frozen: bool = False,
    batch_size: Count = 256,
    seed: CountOrZero = 0,
    data_path: Path | None = None,
    device: str = "auto",
    out: Path | None = None,
) -> Job:
    """Measure the weight loss landscape of runs, attacking afresh at every point, and draw it into a report; what was
    interrupted goes on.

    Args:
        runs: run folders, of one architecture.
        checkpoint: best (on validation), last, or epoch-N where it was kept.
        dimensions: 1, a line; 2, a plane of points x points.
        reach: largest alpha, in units of the normalised direction; the range is -reach ... reach.
        points: alphas, an odd number, so that 0 is one of them.
        directions: random directions (1-D), the same for all runs; with several, the spread is shown.
        direction: random, or adversarial: steepest ascent of each run's own robust loss at w (in 2-D, of the first).
        normalisation: of the direction, to the norm of w's filters or layers.
        split: which images.
        examples: how many of them at most, stratified; 0 takes all.
        steps: of the PGD that attacks at each point; the rest of the threat model is the run's.
        own_loss: measure the objective that each run was trained with beside cross-entropy.
        frozen: attack once, at w, and keep the examples: quick, but too low away from w, and named so.
        batch_size: examples at a time.
        seed: of the first direction, and of the attacks' starts.
        data_path: where the runs' data are now; default where they were.
        device: auto, cpu, cuda, or cuda:N.
        out: the page; default report.html in the run's folder, or beside several.
    """
    _check_points(points)
    if directions > 1 and (direction == "adversarial" or dimensions == 2):
        raise BadInput(f"directions: expected 1 unless they are random and 1-D, got {directions}")

    def job() -> None:
        from saltflat.lab import console, landscapes, subjects

        alphas = landscapes.symmetric(reach, points)
        how = landscapes.How(
            split, examples, steps, batch_size, seed, direction, normalisation, own_loss=own_loss, frozen=frozen
        )
        opened = [
            subjects.from_run(run, checkpoint, device, None, data_path) for run in runs
        ]  # all are looked at before the first is measured
        console.page_of([of.folder for of in opened], out)
        landscapes.check_alike(opened)
        for of in opened:
            began = time.perf_counter()
            if dimensions == 1:
                found = landscapes.line(of, alphas, directions, how)
            else:
                found = landscapes.plane(of, alphas, alphas, how)
            console.say(f"{of.folder}: {landscapes.in_words(found)} ({time.perf_counter() - began:.0f} s)")
        console.report([of.folder for of in opened], out)

    return job


@command
def flatness(
    runs: Runs,
    measures: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "average",
        "adaptive-average",
        "worst",
        "adaptive",
        "keskar",
        "tolerance",
        "slices",
        "curvature",
        "gradients",
        "norms",
    ),
    checkpoint: str = "last",
    split: Split = "train",
    examples: CountOrZero = 512,
    batch_size: Count = 128,
    steps: Count = 10,
    draws: Count = 10,
    climbs: Count = 20,
    restarts: CountOrZero = 1,
    directions: Count = 3,
    probes: Annotated[int, Field(ge=6)] = 60,
    seed: CountOrZero = 0,
    data_path: Path | None = None,
    device: str = "auto",
    out: Path | None = None,
) -> Job:
    """Measure how flat the robust loss of runs is, attacking afresh at every perturbed model; every measure with its
    unit, standard error and settings. What was interrupted goes on.

    Args:
        runs: run folders.
        measures: any of average, average-frozen, adaptive-average, worst, adaptive, keskar, tolerance, slices,
            curvature, density, gradients, norms.
        checkpoint: best (on validation), last, or epoch-N where it was kept.
        split: which images; the training set's, unless the test set may be looked at.
        examples: how many of them at most, stratified; 0 takes all.
        batch_size: examples at a time; worst cases and draws are of each batch.
        steps: of the PGD that attacks; the rest of the threat model is the run's.
        draws: of random noise.
        climbs: steps of each ascent in the weights.
        restarts: ascents from random points, beside the one from w.
        directions: of the 1-D slices that area and width are read from.
        probes: Hessian-vector products for each of trace, layer traces and eigenvalue.
        seed: of all draws.
        data_path: where the runs' data are now; default where they were.
        device: auto, cpu, cuda, or cuda:N.
        out: the page; default report.html in the run's folder, or beside several.
    """

    def job() -> None:
        from saltflat.lab import console, subjects
        from saltflat.lab import flatness as flat
        from saltflat.lab.measures import How

        flat.check(measures)
        how = How(split, examples, batch_size, steps, seed, draws, climbs, restarts, directions, probes)
        opened = [subjects.from_run(run, checkpoint, device, None, data_path) for run in runs]
        console.page_of([of.folder for of in opened], out)
        for of in opened:
            flat.show(of, flat.flatness(of, measures, how))
        console.report([of.folder for of in opened], out)

    return job


@study_command
def gap(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")] = (),
    preset: Literal["small", "paper"] | None = None,
    recipes: tuple[str, ...] = (),
    listing: Path | None = None,
    checkpoints: tuple[str, ...] = (),
    floor: Annotated[float, Field(ge=0, le=100)] | None = None,
    data_path: Path | None = None,
    device: str | None = None,
    out: Folder | None = None,
    workers: CountOrZero = 0,
    dry: bool = False,
) -> Job:
    """Does the robust gap go with flatness? Train a grid of recipes, or take runs and checkpoints that are there;
    measure them all, and write one page with the answer. Models are trained once; what was interrupted goes on.

    Args:
        runs: run folders to take; or else a preset, or a listing.
        preset: small, more than 50 models on the bundled digits, minutes on a CPU; paper, CIFAR-10 with the published
            hyper-parameters, days on a GPU.
        recipes: beside a preset: further recipes by name, each trained with every seed.
        listing: a YAML file that lists checkpoints of others: for each, name, file, network, data, data_path, eps, and
            where needed mean, std, key, norm, step_size, cluster, axes. Paths are seen from the current folder; a
            network module:factory is code that is run.
        checkpoints: beside runs: which of each (best, last, epoch-N), default last; in the bootstrap those of one run
            stay together.
        floor: training robust accuracy in percent below which a model is undertrained, and left out of the main result;
            default the preset's, or 0.
        data_path: beside a preset or runs: where the data are.
        device: auto, cpu, cuda, or cuda:N; default the preset's, or auto.
        out: folder of the study; default studies/gap-PRESET, or studies/gap.
        workers: processes side by side; 0 takes one a core, or one for a GPU.
        dry: list the models, and stop.
    """
    given = [name for name, value in (("runs", runs), ("preset", preset), ("listing", listing)) if value]
    if len(given) != 1:
        raise BadInput(f"preset: expected one of runs, a preset or a listing, got {' and '.join(given) or 'none'}")
    for name, value, fits in (
        ("recipes", recipes, preset is not None),
        ("checkpoints", checkpoints, bool(runs)),
        ("data_path", data_path, listing is None),
    ):
        if value and not fits:
            raise BadInput(f"{name}: expected none here (see --help), got {value}")

    def job() -> None:
        from saltflat.lab import build
        from saltflat.lab.study import gap, grid

        build.device(device or grid.device(preset))
        sys.path.insert(0, "")  # a listing's module:factory may lie in the current folder, as for `python -m`
        folder = out or Path("studies") / (f"gap-{preset}" if preset else "gap")
        if preset is not None:
            asked = gap.of_preset(preset, recipes, folder, data_path, device)
        elif listing is not None:
            asked = gap.of_files(listing, folder, device)
        else:
            asked = gap.of_runs(runs, checkpoints or ("last",), data_path, device)
        if floor is not None:
            asked = replace(asked, floor=floor)
        if dry:
            print("\n".join(asked.models))
            return
        gap.study(asked, folder, workers or build.workers(device or grid.device(preset)))

    return job


@study_command
def process(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    reach: Positive = 1.0,
    points: Count = 21,
    directions: Count = 5,
    examples: CountOrZero = 512,
    steps: Count = 10,
    draws: Count = 10,
    seed: CountOrZero = 0,
    data_path: Path | None = None,
    device: str = "auto",
    out: Folder | None = None,
    workers: CountOrZero = 0,
) -> Job:
    """Does the landscape sharpen as the gap opens? Gap, landscape and flatness of one run over its epochs, before and
    after each drop of the learning rate, at the best and the last: the paper's first experiment.

    Args:
        run: a run that was trained with --keep-every.
        reach: largest alpha, in units of the filter-normalised direction.
        points: alphas, an odd number, so that 0 is one of them.
        directions: random directions, the same for all epochs.
        examples: test images of the landscape, and training images of the flatness, at most, stratified; 0 takes all.
        steps: of the PGD that attacks at each point, and under each perturbation of w.
        draws: of average-case noise.
        seed: of all draws.
        data_path: where the run's data are now; default where they were.
        device: auto, cpu, cuda, or cuda:N.
        out: folder of the page; default the run's.
        workers: processes side by side; 0 takes one a core, or one for a GPU.
    """
    _check_points(points)

    def job() -> None:
        from saltflat.lab import build
        from saltflat.lab.gaps import How as GapHow
        from saltflat.lab.landscapes import How as Slice
        from saltflat.lab.measures import How
        from saltflat.lab.study import process

        build.device(device)
        plan = process.Plan(
            reach,
            points,
            directions,
            Slice(examples=examples, steps=steps, seed=seed),
            GapHow(steps=2 * steps, seed=seed),
            How(examples=examples, steps=steps, draws=draws, directions=directions, seed=seed),
        )
        process.study(run, plan, out or run, workers or build.workers(device), data_path, device)

    return job


@study_command
def compare(
    recipes: Annotated[tuple[str, ...], Field(min_length=1), tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")],
    set: tuple[str, ...] = (),
    seeds: Count = 3,
    attacks: Annotated[tuple[str, ...], Field(min_length=1)] = ("clean", "pgd-20", "cw-20"),
    examples: CountOrZero = 0,
    out: Folder = Path("studies/compare"),
) -> Job:
    """Does one recipe do better than another? Trains them with the same seeds, and pairs their differences on a page.

    For AWP on generated images: `saltflat study compare cifar10-generated cifar10-generated-awp --set
    data.path=cifar-10-python.tar.gz extra.path=1m.npz`.

    Args:
        recipes: their names.
        set: FIELD=VALUE, changes to all of them, such as optimizer.epochs=100.
        seeds: trainings of each.
        attacks: on the best and the last checkpoint of each, as in `saltflat evaluate`.
        examples: of the test set, stratified; 0 takes all.
        out: folder of the runs and of report.html; what is finished there is kept, what is missing is made.
    """

    def job() -> None:
        from saltflat.lab.study import compare

        compare.study(recipes, set, seeds, attacks, examples, out)

    return job


@app.command
def study() -> Job:
    """Studies of many models, of some recipes, and of one model over its epochs: `saltflat study gap | compare |
    process`.
    """
    raise AssertionError("`parsed` goes to the studies' own commands")


@command
def download(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="cifar10|cifar100|svhn|svhn-extra")],
    out: Folder = Path("data"),
) -> Job:
    """Fetch a published data set: checked by its checksum; a transfer that broke off goes on when called again.

    Args:
        name: cifar10, cifar100, svhn, or svhn-extra.
        out: folder for its files; what is there already and whole is not fetched again, what differs not overwritten.
    """

    def job() -> None:
        from saltflat.lab import downloads

        downloads.download(name, out)

    return job


@command
def label(
    run: RunOrCheckpoint,
    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NPZ")],
    out: Path,
    checkpoint: str = "best",
    batch_size: Count = 512,
    device: str = "auto",
    data_path: Path | None = None,
) -> Job:
    """Label images by a network, for `--extra.path` of rst recipes.

    Args:
        run: a run folder, or a .safetensors file in one.
        images: an npz file with `image`, uint8, (N, H, W, C) or (N, C, H, W), of the size that the network knows.
        out: the file to write, an npz with `image` and `label`; it must not exist.
        checkpoint: best (on validation), or last.
        batch_size: images at a time.
        device: auto, cpu, cuda, or cuda:N.
        data_path: where the run's data are now; default where they were.
    """

    def job() -> None:
        from saltflat.lab import labels, subjects

        labels.label(subjects.from_run(run, checkpoint, device, None, data_path), images, out, batch_size)

    return job


@command
def report(runs: Runs, out: Path | None = None) -> Job:
    """Write one HTML page about runs: curves, gap, landscape, tables; it opens offline.

    Args:
        runs: run folders; those that differ only in their seed are averaged.
        out: the file; default report.html in the run's folder, or beside several.
    """

    def job() -> None:
        from saltflat.lab import console

        console.report(runs, out)

    return job


@command
def recipes() -> Job:
    """List the named recipes."""

    def job() -> None:
        width = max(map(len, RECIPES))
        for name, config in RECIPES.items():
            print(f"{name:{width}}  {described(config)}")

    return job


@command
def demo(out: Folder = Path("runs/demo"), seeds: Count = 3) -> Job:
    """Train AT and AT-AWP on the bundled digits, and compare them on a page: about two minutes on two cores.

    Args:
        out: folder of its runs and of report.html; what is finished there is kept, what is missing is made.
        seeds: trainings of each.
    """

    def job() -> None:
        from saltflat.lab import demo

        demo.run(out, seeds)

    return job


def _check_points(points: int) -> None:
    if points < 3 or points % 2 == 0:
        raise BadInput(f"points: expected an odd number >= 3, got {points}")


MARKERS = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.AvoidSubcommands, tyro.conf.CascadeSubcommandArgs)


def parsed(arguments: Sequence[str]) -> Job:
    """The job that the arguments ask for. Raises BadInput, or SystemExit(0) after `--help`."""
    complaint = io.StringIO()
    words = list(arguments) or ["--help"]
    if words == ["study"]:
        words += ["--help"]
    going_on = words[0] == "train" and any(word == "--resume" or word.startswith("--resume=") for word in words)
    columns = os.environ.get("COLUMNS")
    try:
        if "--help" not in words and "-h" not in words:
            os.environ["COLUMNS"] = "1000"  # tyro wraps what it complains of to the terminal
        with contextlib.redirect_stderr(complaint):
            if going_on:
                return tyro.cli(resume, args=words[1:], prog="saltflat train", config=MARKERS)
            of, start = (studies, "saltflat study") if words[0] == "study" else (app, "saltflat")
            job: Job = of.cli(args=words[of is studies :], prog=start, config=MARKERS)
            return job
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BadInput(_one_line(complaint.getvalue())) from None
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


RULES = ("───", "---")


def _one_line(box: str) -> str:
    """What tyro drew in a box: the complaint itself, and the names that it suggests instead."""
    lines = [line.strip("│╭╰╮╯ ") for line in box.splitlines()][1:]  # the first is a title
    inside = list(dropwhile(lambda line: not line or line.startswith(RULES), lines))
    rule = next((i for i, line in enumerate(inside) if line.startswith(RULES)), len(inside))
    complaint = " ".join(inside[:rule]).replace("Error parsing --", "")
    complaint = re.sub(r"invalid literal for int\(\) with base 10:", "expected a whole number, got", complaint)
    rest = " ".join(line for line in inside[rule:] if not line.startswith((*RULES, "For full helptext", "in saltflat")))
    if "Available subcommands" in rest:
        return f"{complaint}; {rest[0].lower() + rest[1:]}"
    if "Perhaps you meant" in rest:
        meant = dict.fromkeys(re.findall(r"--[a-z][\w.-]*", rest))
        return f"{complaint}; perhaps you meant {' or '.join(meant)}"
    return complaint or "arguments that cannot be read"


def main(arguments: Sequence[str] | None = None) -> None:
    """What `saltflat` runs. Exit codes: 0 done, 2 bad input, 1 something failed while working, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    if list(words) == ["--version"]:
        print(f"saltflat {__version__}")
        return
    try:
        parsed(words)()
    except BadInput as error:
        print(f"saltflat: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, OSError) as error:
        print(f"saltflat: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
