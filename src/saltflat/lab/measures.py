"""Every measure of flatness that `saltflat flatness` knows: its radius, its settings in words, its unit.

The mathematics is in `saltflat.landscape`; here are the numbers that people compare, chosen once. All are of the robust
loss at w, in eval mode; "attacked afresh" means at every perturbed model.

Processes that torchrun started share out what is in `INSIDE`, batches of worst cases and points of slices; each other
measure is one process's, beside others of other processes. What is found is what one process finds, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from saltflat import parallel
from saltflat.balls import Box, Ellipsoid, Layerwise, WeightBall, Weights
from saltflat.evaluation import attacked
from saltflat.inputs import PGD
from saltflat.landscape import along, random_direction
from saltflat.landscape.average_case import average_case
from saltflat.landscape.density import spectral_density
from saltflat.landscape.estimate import Estimate, mean
from saltflat.landscape.extent import area, widths
from saltflat.landscape.fisher import fisher_trace, squared_gradients
from saltflat.landscape.hessian import hessian
from saltflat.landscape.lanczos import top_eigenvalues
from saltflat.landscape.noise import adaptive_gaussian, within
from saltflat.landscape.norms import distance, log_norms, weight_norm
from saltflat.landscape.robust import Losses, afresh, continued, frozen, total
from saltflat.landscape.tolerance import tolerated_noise
from saltflat.landscape.trace import layer_traces, trace
from saltflat.landscape.weight_curvature import weight_curvature
from saltflat.landscape.worst_case import Worst, keskar_sharpness, worst_case
from saltflat.lean import leaner
from saltflat.step import AttackOn
from saltflat.weights import Closure

EXACT = 0.0  # standard error of what has no draws
NOTHING = Estimate(math.nan, math.nan, 0)
DEFINITIONS = 1  # raised when a measure changes what it is, so that earlier records are not read as if they were equal


@dataclass(frozen=True)
class How:
    """How flatness is measured; everything in it is on record.

    steps: of the attack. draws: of average-case noise a batch; tolerated noise, which asks for each a dozen times, has
    half as many. climbs: steps of the ascent in w. directions: of the slices. probes: products for traces.

    xi: average case, ‖v_l‖ <= xi ‖w_l‖ (Stutz et al.). rho: adaptive average case, v_i ~ N(0, (rho w_i)^2). gamma:
    worst case, ‖v_l‖ <= gamma ‖w_l‖. rho_l2, rho_linf: adaptive sharpness, ‖v/|w|‖_2 and max |v_i/w_i|. epsilon:
    Keskar's. threshold: rise in nats that tolerated noise may cause. reach, points: of the slices; width: the rise in
    nats at which their half-width is read.
    """

    split: str = "train"
    examples: int = 512
    batch_size: int = 128
    steps: int = 10
    seed: int = 0
    draws: int = 10
    climbs: int = 20
    restarts: int = 1
    directions: int = 3
    probes: int = 60
    xi: float = 0.5
    rho: float = 0.3
    gamma: float = 0.01
    rho_l2: float = 0.5
    rho_linf: float = 0.004
    epsilon: float = 1e-3
    threshold: float = 0.1
    reach: float = 1.0
    points: int = 11
    width: float = 0.5


@dataclass(frozen=True, eq=False)
class Shown:
    """What a measure is given: a network, examples, an attack; and the network's weights before training, where they
    are known.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    attack: PGD
    how: How
    initial: Callable[[], Weights] | None = None
    attack_on: AttackOn = field(default_factory=leaner)

    def afresh(self) -> list[Closure]:
        return afresh(self.model, self.x, self.y, self.attack, **self._drawn)

    def clean(self) -> list[Closure]:
        return afresh(self.model, self.x, self.y, None, **self._drawn)

    def continued(self) -> list[Closure]:
        return continued(self.model, self.x, self.y, self.attack, **self._drawn)

    def frozen(self) -> list[Closure]:
        return frozen(self.model, self.x, self.y, self.attack, **self._drawn)

    def attacked(self) -> Tensor:
        """x' at w, all of them."""
        parts = torch.split(torch.arange(len(self.x)), self.how.batch_size)
        found = partial(attacked, self.model, attack_on=self.attack_on, seed=self.how.seed)
        return torch.cat([found(self.x[rows], self.y[rows], self.attack, ids=rows) for rows in parts])

    @property
    def _drawn(self) -> dict[str, Any]:
        return {"attack_on": self.attack_on, "batch_size": self.how.batch_size, "seed": self.how.seed}


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues as atoms: `nodes` of mass `weights`, which sum to 1 in each run; a row of each for every run."""

    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Found:
    """One measure: what it is called, what came out, and how.

    sign: +1 where more means sharper, -1 where more means flatter, 0 where it means neither. note: why it is not, or
    only partly, measured. starts: of a maximum, what was found from each start; how far they differ says how far the
    search is to be trusted. spectrum: what a density of eigenvalues was made of, in nats / weight².
    """

    name: str
    value: float
    standard_error: float
    unit: str
    settings: str
    sign: int = 1
    note: str = ""
    starts: tuple[float, ...] = ()
    spectrum: Spectrum | None = None


def _average(shown: Shown) -> list[Found]:
    return [
        _in_the_ball("average case", shown, shown.afresh(), "attacked afresh under each v"),
        _in_the_ball("average case, clean loss", shown, shown.clean(), "no attack"),
    ]


def _frozen_average(shown: Shown) -> list[Found]:
    return [_in_the_ball("average case, frozen examples", shown, shown.frozen(), "examples attacked once, at w")]


def _in_the_ball(name: str, shown: Shown, losses: Losses, made: str) -> Found:
    how = shown.how
    rise = average_case(shown.model, losses, within(Layerwise(how.xi)), draws=how.draws, seed=how.seed)
    words = f"v uniform in the ball ‖v_l‖ ≤ {how.xi:g} ‖w_l‖, {how.draws} draws for each batch of {how.batch_size}"
    return _estimated(name, rise, "nats", f"{words}, {made}")


def _adaptive_average(shown: Shown) -> list[Found]:
    how = shown.how
    rise = average_case(shown.model, shown.afresh(), adaptive_gaussian(how.rho), draws=how.draws, seed=how.seed)
    words = f"v_i ~ N(0, ({how.rho:g} w_i)²), {how.draws} draws for each batch of {how.batch_size}, attacked afresh"
    return [_estimated("adaptive average case", rise, "nats", words)]


def _worst(shown: Shown) -> list[Found]:
    gamma = shown.how.gamma
    words = f"‖v_l‖ ≤ {gamma:g} ‖w_l‖"
    alternating = _by_batch(shown, Layerwise(gamma))
    joint = _by_batch(shown, Layerwise(gamma), shown.continued)
    return [
        _highest("worst case, alternating", alternating, shown, f"{words}, attacked afresh before each step"),
        _highest("worst case, joint", joint, shown, f"{words}, one step of the attack with each step in w"),
    ]


def _one_of(losses: Callable[[], Losses], number: int) -> Losses:
    return [losses()[number]]


def _adaptive(shown: Shown) -> list[Found]:
    l2, linf = shown.how.rho_l2, shown.how.rho_linf
    in_l2, in_linf = (_by_batch(shown, ball) for ball in (Ellipsoid(l2), Box(linf)))
    made = "attacked afresh before each step"
    return [
        _highest("adaptive sharpness, L2", in_l2, shown, f"‖v/|w|‖₂ ≤ {l2:g}, {made}"),
        _highest("adaptive sharpness, L-inf", in_linf, shown, f"|v_i| ≤ {linf:g} |w_i|, {made}"),
    ]


def _keskar(shown: Shown) -> list[Found]:
    epsilon, how = shown.how.epsilon, shown.how
    worst = worst_case(
        shown.model,
        shown.afresh(),
        Box(epsilon, offset=1.0),
        steps=how.climbs,
        restarts=how.restarts,
        seed=how.seed,
        where=_trained,
    )
    words = f"|v_i| ≤ {epsilon:g} (|w_i| + 1), all weights, all examples, attacked afresh before each step"
    starts = tuple(keskar_sharpness(replace(worst, value=value)) for value in worst.by_start)
    settings = f"{words}, {_climb(shown)}"
    return [Found("Keskar's sharpness", keskar_sharpness(worst), math.nan, "%", settings, starts=starts)]


def _tolerance(shown: Shown) -> list[Found]:
    threshold, how = shown.how.threshold, shown.how
    losses, draws = shown.afresh(), max(2, how.draws // 2)
    sigma = tolerated_noise(
        shown.model,
        lambda: total(losses),
        adaptive_gaussian(1.0),
        threshold=threshold,
        draws=draws,
        seed=how.seed,
        first=0.05,
        halvings=6,
    )
    words = f"largest σ with a mean rise ≤ {threshold} nats, v_i ~ N(0, (σ w_i)²), {draws} draws, attacked afresh"
    return [_estimated("PAC-Bayes σ", sigma, "of |w|", words, sign=-1)]


def _slices(shown: Shown) -> list[Found]:
    how = shown.how
    reach, points, threshold = how.reach, how.points, how.width
    alphas, losses = np.linspace(-reach, reach, points), shown.afresh()
    directions = range(how.seed, how.seed + how.directions)
    curves = [_curve(shown.model, random_direction(shown.model, seed), alphas.tolist(), losses) for seed in directions]
    words = (
        f"{points} α in [−{reach:g}, {reach:g}], {how.directions} random filter-normalised directions, attacked afresh"
    )
    areas = [area(alphas, g) for g in curves]
    sides = np.array([widths(alphas, g, threshold) for g in curves])
    beyond = int((sides > reach).sum())
    half_widths = np.minimum(sides, reach).mean(1)  # censored, or the flattest models would have no number
    half = _over_directions(
        "landscape half-width",
        half_widths,
        "of ‖w‖",
        f"first rise by {threshold:g} nats on either side, at most {reach:g}; {words}",
        sign=-1,
    )
    if beyond:
        half = replace(half, note=f"on {beyond} of {sides.size} sides it is not reached by {reach:g}")
    if beyond == sides.size:
        half = replace(half, standard_error=math.nan)
    return [_over_directions("landscape area", areas, "nats", words), half]


def _curve(model: nn.Module, direction: Weights, alphas: Sequence[float], losses: Losses) -> list[float]:
    def value(alpha: float) -> float:
        ((_, g),) = along(model, direction, [alpha], lambda: total(losses))
        return g

    return parallel.shared_out(alphas, value)


def _curvature(shown: Shown) -> list[Found]:
    how, operator = shown.how, hessian(shown.model, shown.frozen())
    shared = f"examples attacked once, at w; {len(operator.layers)} weights of more than one dimension"
    try:
        top = top_eigenvalues(operator, 1, steps=how.probes, tolerance=1e-3, seed=how.seed)
        largest = Estimate(top.values[0].item(), top.residuals[0].item(), top.steps)
        note = "" if top.converged else "not converged to 1e-3"
        whole, traces = trace(operator, how.probes, how.seed), layer_traces(operator, how.probes, how.seed)
    except FloatingPointError as error:
        largest = whole = NOTHING
        traces, note = dict.fromkeys(operator.layers, NOTHING), str(error)
    index = weight_curvature(shown.model, traces)
    unit = "nats / weight²"
    found = [
        _estimated(
            "largest Hessian eigenvalue",
            largest,
            unit,
            f"Lanczos, at most {how.probes} products, the error is the residual; {shared}",
            note=note,
        ),
        _estimated("Hessian trace", whole, unit, f"Hutch++, {how.probes} products; {shared}"),
        _estimated(
            "weight-curvature index",
            index.index,
            "nats^½",
            f"Σ ‖W_k‖ √tr H_k, {how.probes} probes; {shared}",
            note=f"negative traces taken as 0: {', '.join(index.negative)}" if index.negative else "",
        ),
    ]
    layers = [
        _estimated(f"Hessian trace of {name}", part, unit, f"Hutchinson, {how.probes} probes; {shared}")
        for name, part in traces.items()
    ]
    return found + layers


def _density(shown: Shown) -> list[Found]:
    how, operator = shown.how, hessian(shown.model, shown.frozen())
    runs, share = 3, 1e-4
    words = (
        f"below −{share:g} of the largest; stochastic Lanczos quadrature, {runs} runs of {how.probes // runs} products"
    )
    name, unit, settings = "share of negative Hessian eigenvalues", "of 1", f"{words}; examples attacked once, at w"
    try:
        density = spectral_density(operator, how.probes // runs, runs, how.seed)
    except FloatingPointError as error:
        return [_estimated(name, NOTHING, unit, settings, note=str(error))]
    least = share * density.nodes.abs().max().item()  # nearer to 0 than that, their sign is rounding
    negative = mean(torch.where(density.nodes < -least, density.weights, 0).sum(1))
    spectrum = Spectrum(_rows(density.nodes), _rows(density.weights))
    return [replace(_estimated(name, negative, unit, settings), spectrum=spectrum)]


def _rows(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def _gradients(shown: Shown) -> list[Found]:
    x = shown.attacked()
    words = "at examples attacked once, at w; error over examples"
    true, squared = fisher_trace(shown.model, x), squared_gradients(shown.model, x, shown.y)
    unit = "nats² / weight²"
    return [
        _estimated("Fisher trace", true, unit, f"labels by the model's own beliefs, exact over classes, {words}"),
        _estimated("mean squared gradient", squared, unit, f"labels of the data (no Fisher matrix), {words}"),
    ]


def _norms(shown: Shown) -> list[Found]:
    words = "weights of more than one dimension"
    found = [
        Found("weight norm", weight_norm(shown.model), EXACT, "weights", words, sign=0),
        Found("sum of log norms", log_norms(shown.model), EXACT, "log weights", f"by layer, {words}", sign=0),
    ]
    if shown.initial is not None:
        far = distance(shown.model, shown.initial())
        found.append(Found("distance from the start", far, EXACT, "weights", f"‖w − w₀‖₂, {words}", sign=0))
    return found


def _by_batch(shown: Shown, ball: WeightBall, climbed: Callable[[], Losses] | None = None) -> list[Worst]:
    """The worst case of each batch, without its displacement."""
    how, losses = shown.how, shown.afresh()

    def worst(number: int) -> Worst:
        found = worst_case(
            shown.model,
            [losses[number]],
            ball,
            steps=how.climbs,
            restarts=how.restarts,
            seed=how.seed,
            climbed=None if climbed is None else partial(_one_of, climbed, number),
        )
        return replace(found, displacement={})

    return parallel.shared_out(range(len(losses)), worst)


def _highest(name: str, worst: Sequence[Worst], shown: Shown, words: str) -> Found:
    """The sum over batches. A maximum has no standard error; what each start found stands in its place."""
    starts = tuple(sum(found.by_start[number] for found in worst) for number in range(shown.how.restarts + 1))
    settings = f"{words}, max over v for each batch of {shown.how.batch_size}, {_climb(shown)}"
    return Found(name, sum(found.value for found in worst), math.nan, "nats", settings, starts=starts)


def _climb(shown: Shown) -> str:
    n = shown.how.restarts
    return f"{shown.how.climbs} steps from w" + (f" and from {n} random start{'' if n == 1 else 's'}" if n else "")


def _trained(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _estimated(name: str, found: Estimate, unit: str, settings: str, sign: int = 1, note: str = "") -> Found:
    return Found(name, found.value, found.standard_error, unit, settings, sign, note)


def _over_directions(name: str, values: ArrayLike, unit: str, settings: str, sign: int = 1) -> Found:
    found = mean(torch.from_numpy(np.asarray(values, np.float64)))
    return Found(name, found.value, found.standard_error, unit, settings, sign)


MEASURES: dict[str, Callable[[Shown], list[Found]]] = {
    "average": _average,
    "average-frozen": _frozen_average,
    "adaptive-average": _adaptive_average,
    "worst": _worst,
    "adaptive": _adaptive,
    "keskar": _keskar,
    "tolerance": _tolerance,
    "slices": _slices,
    "curvature": _curvature,
    "density": _density,
    "gradients": _gradients,
    "norms": _norms,
}
INSIDE = ("worst", "adaptive", "slices")  # processes have to ask for these together
LONGEST = ("tolerance", "density", "curvature", "keskar", "average", "gradients")  # of the others, about
