"""From nothing to trained networks: `saltflat demo | recipes | download | train | label`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from saltflat.lab.commands.frame import Executor, Folder, Job, RunOrCheckpoint, Seeds, app, command
from saltflat.lab.config import BadInput, Count, CountOrZero, Train, checked
from saltflat.lab.recipes import RECIPES, described

if TYPE_CHECKING:
    Recipe = Train
else:
    Recipe = Annotated[
        tyro.extras.subcommand_type_from_defaults(
            RECIPES, {name: described(config) for name, config in RECIPES.items()}
        ),
        tyro.conf.arg(name=""),
    ]


@command
def demo(
    out: Folder = Path("runs/demo"), seeds: Seeds = 3, workers: CountOrZero = 0, executor: Executor = "local"
) -> Job:
    """Train AT and AT-AWP on the bundled digits, and compare them on a page: about two minutes on two cores.

    Args:
        out: folder of its runs and of report.html; what is finished there is kept, what is missing is made.
        seeds: trainings of each.
        workers: processes side by side; 0 takes one a core, or one for a GPU.
        executor: who trains: local, processes here; tcp://HOST:8786, the workers of a Dask scheduler; or
            package.module:function, code that is called for an executor (docs/cluster.md).
    """

    def job() -> None:
        from saltflat.lab import demo
        from saltflat.lab.study import executors

        demo.run(out, seeds, executors.named(executor, workers, "auto"))

    return job


@command
def recipes(
    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[WORD ...]")] = (),
) -> Job:
    """List the named recipes.

    Args:
        words: only those with all of these in their names: `saltflat recipes cifar10 trades`.
    """
    found = {name: config for name, config in RECIPES.items() if all(word in name for word in words)}
    if not found:
        raise BadInput(f"words: expected parts of a recipe's name, such as cifar10 or trades, got {' '.join(words)!r}")

    def job() -> None:
        width = max(map(len, found))
        for name, config in found.items():
            print(f"{name:{width}}  {described(config)}")

    return job


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


@app.command
def train(recipe: Recipe, out: Folder | None = None, go_on: bool = False) -> Job:
    """Train a network by a recipe, or go on with a run: `saltflat train --resume RUN`. On many processes:
    `torchrun --nproc-per-node N -m saltflat train RECIPE`.

    Args:
        recipe: what to train, and how; every field can be overridden.
        out: folder of the run, which must not exist; default runs/RECIPE-seedN.
        go_on: where the run is there already, go on with it; it has to be of the same recipe. One command for a job
            that may be put back into the queue.
    """
    config = checked(recipe)

    def job() -> None:
        from saltflat.lab import trainings

        start = trainings.made if go_on else trainings.train
        start(config, out or Path("runs") / f"{config.recipe}-seed{config.seed}")

    return job


def train_by(name: str) -> Callable[..., Job]:
    """`train` by this recipe alone."""

    def train_so(
        recipe: Annotated[Train, tyro.conf.arg(name="")] = RECIPES[name], out: Folder | None = None, go_on: bool = False
    ) -> Job:
        return train(recipe, out, go_on)

    return train_so


def resume(resume: Folder) -> Job:
    """Go on with a run from what it saved last, to end as if it had never stopped.

    Args:
        resume: folder of the run.
    """

    def job() -> None:
        from saltflat.lab import trainings

        trainings.resume(resume)

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
