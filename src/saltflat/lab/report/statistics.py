"""Statistics over seeds: values by seed, their mean and sample standard deviation, and differences seed by seed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from saltflat.lab.report.runs import Epoch, Run


@dataclass(frozen=True)
class Spread:
    """Values by seed, with their mean and sample standard deviation; nan where there is none."""

    by_seed: Mapping[int, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(list(self.by_seed.values()))) if self.by_seed else math.nan

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if self.n > 1 else math.nan


def finite(by_seed: Mapping[int, float | None]) -> Spread:
    """The spread of those values that are there and finite."""
    return Spread({seed: value for seed, value in by_seed.items() if value is not None and math.isfinite(value)})


def over_seeds(runs: Sequence[Run], quantity: Callable[[Run], float | None]) -> Spread:
    """A quantity of every run that has it."""
    return finite({run.seed: quantity(run) for run in runs})


def paired(first: Spread, second: Spread) -> Spread:
    """second − first at the seeds that both have."""
    return Spread({s: second.by_seed[s] - first.by_seed[s] for s in first.by_seed if s in second.by_seed})


def at(pick: Callable[[Run], Epoch | None], quantity: Callable[[Epoch], float]) -> Callable[[Run], float | None]:
    """A quantity of an epoch as a quantity of a run."""
    return lambda run: quantity(epoch) if (epoch := pick(run)) else None


def last(run: Run) -> Epoch | None:
    """The last epoch, to be handed to `at`."""
    return run.last


def best(run: Run) -> Epoch | None:
    """The best epoch, to be handed to `at`."""
    return run.best


def drop(run: Run) -> float | None:
    """Percentage points of robust test accuracy lost between the best epoch and the last."""
    return run.best.robust - run.last.robust if run.best and run.last else None
