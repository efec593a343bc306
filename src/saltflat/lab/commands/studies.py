"""Many networks beside each other: `saltflat study gap | compare | claims | process`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from saltflat.lab.commands.frame import Executor, Folder, Job, Seeds, app, check_points, study_command
from saltflat.lab.config import BadInput, Count, CountOrZero, Positive


@app.command
def study() -> Job:
    """Studies of many models, of some recipes, of the paper's claims, and of one model over its epochs: `saltflat study
    gap | compare | claims | process`.
    """
    raise AssertionError("`parsed` goes to the studies' own commands")


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
    executor: Executor = "local",
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
        executor: who works on the models: local, processes here; tcp://HOST:8786, the workers of a Dask scheduler; or
            package.module:function, code that is called for an executor (docs/cluster.md).
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
        from saltflat.lab.study import executors, gap, grid

        engine = executors.named(executor, workers, device or grid.device(preset))
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
        gap.study(asked, folder, engine)

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
    executor: Executor = "local",
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
        executor: who works on the models: local, processes here; tcp://HOST:8786, the workers of a Dask scheduler; or
            package.module:function, code that is called for an executor (docs/cluster.md).
    """
    check_points(points)

    def job() -> None:
        from saltflat.lab.gaps import How as GapHow
        from saltflat.lab.landscapes import How as Slice
        from saltflat.lab.measures import How
        from saltflat.lab.study import executors, process

        engine = executors.named(executor, workers, device)
        plan = process.Plan(
            reach,
            points,
            directions,
            Slice(examples=examples, steps=steps, seed=seed),
            GapHow(steps=2 * steps, seed=seed),
            How(examples=examples, steps=steps, draws=draws, directions=directions, seed=seed),
        )
        process.study(run, plan, out or run, engine, data_path, device)

    return job


@study_command
def compare(
    recipes: Annotated[tuple[str, ...], Field(min_length=1), tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")],
    set: tuple[str, ...] = (),
    seeds: Seeds = 3,
    attacks: Annotated[tuple[str, ...], Field(min_length=1)] = ("clean", "pgd-20", "cw-20"),
    examples: CountOrZero = 0,
    out: Folder = Path("studies/compare"),
    workers: CountOrZero = 0,
    executor: Executor = "local",
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
        workers: processes side by side, of one thread each unless `threads` is set; 0 takes as many as there are cores
            for, or one for a GPU.
        executor: who trains and attacks: local, processes here; tcp://HOST:8786, the workers of a Dask scheduler; or
            package.module:function, code that is called for an executor (docs/cluster.md).
    """

    def job() -> None:
        from saltflat.lab.study import compare, executors

        runs = compare.configs(recipes, set, seeds, out)
        one = next(iter(runs.values()))
        engine = executors.named(executor, workers, one.device, one.threads)
        compare.study(runs, attacks, examples, out, engine)

    return job


@study_command
def claims(
    preset: Literal["small", "cpu", "paper"] = "small",
    arms: tuple[str, ...] = (),
    seeds: Seeds = 3,
    set: tuple[str, ...] = (),
    extra_path: Path | None = None,
    out: Folder | None = None,
    workers: CountOrZero = 0,
    executor: Executor = "local",
    dry: bool = False,
) -> Job:
    """Does AWP do what its paper says? Trains the methods with and without it, its neighbours, its settings, other
    remedies, schedules and another network; measures the best and the last of each, and pairs their differences on a
    page. One command, which goes on where it was interrupted.

    The paper's own setting, on a GPU: `saltflat study claims --preset paper --set data.path=cifar-10-python.tar.gz
    --extra-path ti_500K_pseudo_labeled.pickle`.

    Args:
        preset: small, the bundled digits, half an hour or so on two cores; cpu, 1,000 images of CIFAR-10 and a small
            network, some hours; paper, CIFAR-10, PreActResNet-18 and 200 epochs, on a GPU.
        arms: which trainings, by name, and what they are held against; default all.
        seeds: trainings of each.
        set: FIELD=VALUE, changes to all of them, such as data.path=cifar-10-python.tar.gz.
        extra_path: further labelled images, for rst; without them it is left out.
        out: folder of runs, results and claims.html; default studies/claims-PRESET. What is finished there is kept.
        workers: processes side by side, of one thread each unless `threads` is set; 0 takes as many as there are cores
            for, or one for a GPU.
        executor: who trains and attacks: local, processes here; tcp://HOST:8786, the workers of a Dask scheduler; or
            package.module:function, code that is called for an executor (docs/cluster.md).
        dry: list the runs, and stop.
    """

    def job() -> None:
        from saltflat.lab.study import arms as given
        from saltflat.lab.study import claims, compare, executors

        folder, of = out or Path("studies") / f"claims-{preset}", given.PRESETS[preset]
        if varied := [change for change in set if change.startswith(("awp", "objective", "seed"))]:
            raise BadInput(f"set: expected fields in which arms do not differ, got {varied[0]!r}")
        base = compare.changed(of.base, set)
        chosen = given.chosen(of, arms, extra_path)
        runs = {
            f"{arm.name}-seed{seed}": (arm, given.config(base, arm, seed, extra_path))
            for arm in chosen
            for seed in range(seeds)
        }
        if dry:
            print("\n".join(runs))
            return
        engine = executors.named(executor, workers, base.device, base.threads)
        by_name = {arm.name: arm for arm in of.arms}

        def expected(name: str, seed: int) -> claims.Entry | None:
            if name not in by_name:
                return None
            config = given.config(base, by_name[name], seed, extra_path)
            return claims.entry(by_name[name], config, of.plan, folder)

        entries = {name: claims.entry(*each, of.plan, folder) for name, each in runs.items()}
        claims.study(entries, expected, f"The claims of AWP, {preset} preset", folder, engine)

    return job
