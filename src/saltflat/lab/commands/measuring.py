"""What trained networks are: `saltflat evaluate | export | landscape | flatness | report`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from saltflat.lab.commands.frame import Folder, Job, RunOrCheckpoint, Runs, Split, check_points, command
from saltflat.lab.config import BadInput, Count, CountOrZero, Number, Positive
from saltflat.lab.record import check_folder


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
        batch_size: examples at a time; of several processes (torchrun), each takes such a batch.
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
    if model is None and run.is_file() and run.suffix != ".safetensors":
        raise BadInput(f"model: expected the network of the checkpoint {str(run)!r} (see --help), got none")
    foreign = {"data": data, "mean": mean, "std": std, "key": key, "out": out}
    if model is None and (given := [name for name, value in foreign.items() if value]):
        got = repr(str(foreign[given[0]]) if given[0] == "out" else foreign[given[0]])
        raise BadInput(f"{given[0]}: goes with --model, a run knows its own; got {got}")
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
            folder = out or Path("evaluations") / run.stem
            check_folder("out", folder / "outcomes")
            subject = subjects.from_file(run, about, held, device, folder)
        names = threat.SUITES[suite] if suite else attacks
        how = evaluations.How(batch_size, seed, precision, padded)
        evaluations.show(subject, evaluations.evaluation(subject, names, split, examples, how))

    return _together(device, job)


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
    reach: Annotated[Number, Field(gt=0, le=1e6)] = 1.0,
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
    check_points(points)
    if directions > 1 and (direction == "adversarial" or dimensions == 2):
        raise BadInput(f"directions: expected 1 unless they are random and 1-D, got {directions}")

    def job() -> None:
        from saltflat import parallel
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
        parallel.first(lambda: console.report([of.folder for of in opened], out))

    return _together(device, job)


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
    probes: Annotated[Count, Field(ge=6)] = 60,
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
        from saltflat import parallel
        from saltflat.lab import console, subjects
        from saltflat.lab import flatness as flat
        from saltflat.lab.measures import How

        flat.check(measures)
        how = How(split, examples, batch_size, steps, seed, draws, climbs, restarts, directions, probes)
        opened = [subjects.from_run(run, checkpoint, device, None, data_path) for run in runs]
        console.page_of([of.folder for of in opened], out)
        for of in opened:
            flat.show(of, flat.flatness(of, measures, how))
        parallel.first(lambda: console.report([of.folder for of in opened], out))

    return _together(device, job)


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


def _together(device: str, job: Job) -> Job:
    """The same job, which the processes that torchrun started do together."""

    def shared() -> None:
        from saltflat.lab import once

        with once.together(device):
            job()

    return shared
