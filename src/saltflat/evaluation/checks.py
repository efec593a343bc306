"""When a robust accuracy should not be trusted: signs of it, each with what raises it and what it means.

    check(...) -> None, or Flag(name, found, explanation)

An attack that fails proves nothing. A network can make it fail without being robust: by answering at random, by giving
no gradient, by being asked in another mode, in another range or with another eps than was meant. Every function here
looks for one of these. Its docstring says under "Raised if" exactly when it speaks, and under "Explanation" what
follows; a flag carries that very paragraph. No flag proves that an accuracy is wrong, and no silence that it is right.

`before` runs all that can speak before an attack; `black_box_beats_white_box` and `weak_pgd` look at what attacks do.

`logits` is x' (M, ...) -> (M, C), the network as it is attacked, in full or half precision; x is floating point, y (N,)
int64. An empty batch raises nothing. No check changes anything: modes, weights, `.grad`, torch's global generators
(CPU and CUDA), and the buffers of a model that is given are as before. A function that calls a model is not looked
into, and a generator of the network's own is advanced by what it draws.

Sources: Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, arXiv 1802.00420;
Carlini et al., "On evaluating adversarial robustness", arXiv 1902.06705; Croce and Hein, arXiv 2003.01690, whose
AutoAttack has flags of this kind.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from saltflat.balls import L1, L2, InputBall, Linf, Range
from saltflat.evaluation.restarts import Restarted
from saltflat.evaluation.search import Logits, find
from saltflat.inputs import PGD
from saltflat.objectives import ce, margin
from saltflat.random import PerExample
from saltflat.weights import buffers_kept

# The table in `unusual_eps`, and p of each norm
USUAL: dict[type, tuple[float, ...]] = {Linf: (0.1, 8 / 255, 4 / 255), L2: (1.5, 0.5, 3.0), L1: (10.0, 12.0, 255.0)}
POWER = {Linf: math.inf, L2: 2.0, L1: 1.0}
FACTOR = 10.0
SHORT, LONG, RESTARTS = 20, 100, 10  # of `weak_pgd`: steps, steps, and how often


@dataclass(frozen=True)
class Flag:
    """A reason to doubt.

    Attributes:
        name: of the check that raised it.
        found: one line, with the figures that raised it.
        explanation: the paragraph "Explanation" of the check's docstring (empty under python -OO, which drops those).
    """

    name: str
    found: str
    explanation: str


def before(model: nn.Module, logits: Logits, x: Tensor, y: Tensor, ball: InputBall) -> list[Flag]:
    """Everything that can be said before an attack, from one batch: the flags of `train_mode`, `outside_box`,
    `unusual_eps`, `randomised`, `probabilities` and `zero_gradients`, in this order.

    `model` is what `logits` calls, and often is `logits`; its modes are looked at, and its buffers put back. x are the
    clean inputs, and `ball` is what will be searched. Cost: 7 forwards and 2 backwards of the batch.

    >>> model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 2))
    >>> x, y = torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.long)
    >>> [flag.name for flag in before(model, model, x, y, L2(8 / 255))]
    ['train_mode', 'unusual_eps', 'randomised']
    >>> before(model.eval(), model, x, y, L2(0.5))
    []
    """
    with _undisturbed(model, x):
        flags = [
            train_mode(model),
            outside_box(x, ball.box),
            unusual_eps(ball, x.shape),
            randomised(logits, x, y),
            probabilities(logits, x),
            zero_gradients(logits, x, y),
        ]
    return [flag for flag in flags if flag is not None]


def train_mode(model: nn.Module) -> Flag | None:
    """Layers that behave as in training.

    Raised if: a BatchNorm module (of any kind) is in train mode or has no running statistics, or a Dropout module (of
    any kind) with p > 0 is in train mode. Functions are not seen here, but `randomised` sees what dropout does.

    Explanation: BatchNorm then uses the statistics of the batch that it is in: an answer depends on the other inputs,
    which an attack moves as well, and on how many are left in the search. Dropout draws another network for each query.
    Neither is the network that will be used: call model.eval(), and give BatchNorm running statistics.

    >>> train_mode(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())).found
    '2 of 2 modules: 1 (BatchNorm1d), 2 (Dropout)'
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm | _DropoutNd)]
    training = [f"{name or 'model'} ({type(layer).__name__})" for name, layer in layers if _as_in_training(layer)]
    if not training:
        return None
    shown = ", ".join(training[:3] + ["..."] * (len(training) > 3))
    return _flag(train_mode, f"{len(training)} of {len(layers)} modules: {shown}")


def outside_box(x: Tensor, box: Range) -> Flag | None:
    """Inputs that are no images of the range that they were said to have.

    Raised if: a number of x is NaN, or lies outside the box by more than 1e-6 of the box's width, which rounding may
    do. Without a box nothing is raised.

    Explanation: The box and the inputs disagree. Attacks clamp what they find to the box, which moves such an input
    further than eps or holds it where it is; eps has another meaning, too. Images in 0 to 255 are to be divided by 255;
    normalised ones are to be given as they were before, and to be normalised inside the model.

    >>> outside_box(torch.tensor([[0.0, 255.0]]), (0.0, 1.0)).found
    'x goes from 0 to 255, and the box from 0 to 1; 1 of 1 inputs leave it'
    """
    if box is None or x.numel() == 0:
        return None
    (low, high), slack = box, 1e-6 * (box[1] - box[0])
    within = (x.double() >= low - slack) & (x.double() <= high + slack)  # false for NaN
    outside = int((~within).reshape(len(x), -1).any(1).sum())
    if outside == 0:
        return None
    return _flag(
        outside_box,
        f"x goes from {x.min():g} to {x.max():g}, and the box from {low:g} to {high:g}; "
        f"{outside} of {len(x)} inputs leave it",
    )


def unusual_eps(ball: InputBall, shape: Sequence[int]) -> Flag | None:
    """A radius that looks like that of another norm, or of another range, for a batch of this shape, (N, ...).

        r = eps / (high - low),    q = r / usual,    reach = D^(1/p) / 2    (D numbers an input, p the norm's)

        usual    (1, H, W) to 32 x 32    (C, H, W) to 64 x 64    larger images
        L-inf    0.1                     8/255                   4/255
        L2       1.5                     0.5                     3
        L1       10                      12                      255

    Raised if: the inputs are images, and q < 1/10 or q > 10; or r >= reach, for inputs of any shape: then the ball
    around every input holds the middle of the box. The factor lets through what is in use (for CIFAR L-inf from 1/255
    to 64/255 and L2 from 1/16 to 4, for ImageNet L-inf from 0.5/255 to 32/255, for MNIST 0.1 and 0.3), and none of the
    usual mix-ups for colour images, of which the nearest are a factor 16 away: L2 with 8/255, L-inf with 0.5. Without
    a box there is no unit, and of norms other than these nothing is known: then nothing is raised.

    Explanation: Too small a radius makes any network look robust, and too large a one none. The usual reasons are a
    radius that belongs to another norm, and pixels counted from 0 to 255 in one place and from 0 to 1 in another. If
    the radius is meant, say so where the accuracy is published, and compare with nothing measured at another.

    >>> unusual_eps(L2(8 / 255), (10, 3, 32, 32)).found
    'eps 0.0314 in L2 is 0.0627 times the usual 0.5 for inputs (3, 32, 32); it would be usual in Linf'
    >>> unusual_eps(Linf(8 / 255), (10, 3, 32, 32)) is None
    True
    """
    norm, inputs = type(ball), tuple(shape[1:])
    if ball.box is None or norm not in USUAL:
        return None
    width, column = ball.box[1] - ball.box[0], _column_of_usual(inputs)
    r, reach = ball.radius / width, math.prod(inputs) ** (1 / POWER[norm]) / 2
    if column is not None and not 1 / FACTOR <= r / USUAL[norm][column] <= FACTOR:
        usual = USUAL[norm][column]
        fitting = [other.__name__ for other in USUAL if 0.5 <= r / USUAL[other][column] <= 2]
        return _flag(
            unusual_eps,
            f"eps {ball.radius:.3g} in {norm.__name__} is {r / usual:.3g} times the usual {usual * width:.3g} "
            f"for inputs {inputs}" + (f"; it would be usual in {' and '.join(fitting)}" if fitting else ""),
        )
    if r < reach:
        return None
    return _flag(
        unusual_eps,
        f"eps {ball.radius:.3g} in {norm.__name__} reaches the middle of the box from every input; "
        f"for inputs {inputs} that takes {reach * width:.3g}",
    )


def randomised(logits: Logits, x: Tensor, y: Tensor) -> Flag | None:
    """The same inputs do not get the same answers.

        change = max_{s,i,k} |z_s,ik - z_0,ik| / max_{s,i,k} |z_s,ik|,    z_s = logits(x), s = 0 ... 4

    Raised if: change > sqrt(eps of the logits' dtype), half of its digits: 3.5e-4 in fp32, 1.5e-8 in fp64, 0.09 in
    bf16. Additions in another order, as on a GPU, change the last digits and stay far below; so does an answer that
    flips where two logits tie within that. Logits that are not finite count as 0.

    Explanation: The network draws random numbers, so each query sees another network. A single gradient says little,
    an example that was fooled once may be right the next time, and attacks that compare values, APGD and Square among
    them, compare luck. Attack the expectation instead: average gradients and decisions over many draws.

    Cost: 5 forwards. Chance that depends on the input alone is not seen here.

    >>> x, y = torch.rand(8, 3), torch.zeros(8, dtype=torch.long)
    >>> randomised(lambda x: x + 0.1 * torch.randn_like(x), x, y).name
    'randomised'
    >>> randomised(lambda x: x, x, y) is None
    True
    """
    if len(x) == 0:
        return None
    with _undisturbed(logits, x), torch.no_grad():
        answers = torch.stack([logits(x) for _ in range(5)])
    z = answers.double().nan_to_num(0.0, 0.0, 0.0)
    change, largest = float((z - z[0]).abs().max()), float(z.abs().max())
    if change <= math.sqrt(torch.finfo(answers.dtype).eps) * largest:
        return None
    right = answers.argmax(2) == y
    changed = int((right != right[0]).any(0).sum())
    return _flag(
        randomised,
        f"logits of the same inputs differ by up to {change / largest:.2g} of the largest in {len(z)} forwards; "
        f"{changed} of {len(x)} verdicts change",
    )


def probabilities(logits: Logits, x: Tensor) -> Flag | None:
    """The network gives probabilities where logits were expected.

    Raised if: all outputs lie in [0, 1] and every row sums to 1, up to 1e-5 or twice the rounding of the outputs'
    dtype, whichever is more (1.6e-2 in bf16). Outputs in [0, 1] alone raise nothing, nor do log-probabilities:
    cross-entropy, the margin and the DLR loss are the same for z and for z - logsumexp(z).

    Explanation: The network ends in a softmax, or gives decisions as zeros and ones. A loss that takes its outputs for
    logits is then a softmax of a softmax, bounded and flat where the network is sure, and in fp32 its gradient
    vanishes. Remove the last softmax, or attack the logarithm of the outputs.

    Cost: 1 forward.

    >>> x = torch.randn(8, 3)
    >>> probabilities(lambda x: x.softmax(1), x).found
    'the outputs of all 8 inputs lie in [0, 1] and sum to 1'
    >>> probabilities(lambda x: x.log_softmax(1), x) is None
    True
    """
    if len(x) == 0:
        return None
    with _undisturbed(logits, x), torch.no_grad():
        z = logits(x)
    slack, p = max(1e-5, 2 * torch.finfo(z.dtype).eps), z.double()
    if (p < -slack).any() or not ((p.sum(1) - 1).abs() <= slack).all():
        return None
    return _flag(probabilities, f"the outputs of all {len(x)} inputs lie in [0, 1] and sum to 1")


def zero_gradients(logits: Logits, x: Tensor, y: Tensor) -> Flag | None:
    """Gradients by which attacks would climb are missing.

        g_i = d CE(logits(x_i), y_i) / d x_i,    missing: g_i = 0 in every entry, or not finite in one

    Raised if: the gradient is missing at more than 10 % of the inputs that are classified correctly, and at two at
    least. An input here and there of which the network is extremely sure (its margin above 100 in fp32) has no gradient
    in honest networks, too; there the margin's gradient remains, and the figures give it as well. Misclassified inputs
    need no attack and are not counted.

    Explanation: An attack that follows this gradient takes no step and reports its start as robust. The network rounds,
    takes decisions inside, or is so sure that the softmax saturates. Where the margin's gradient is there, attacks on
    the margin or on the DLR loss still work, and those on cross-entropy do not. Where it is missing, too, only Square,
    SPSA, or an attack on a smooth stand-in for the network can tell anything.

    Cost: 1 forward and 2 backwards, with respect to x only. A gradient that vanishes elsewhere than at x is not seen.

    >>> x, y = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
    >>> zero_gradients(lambda x: x.round(), x, y).found
    "cross-entropy's gradient is missing at 2 of 2 correctly classified inputs, the margin's at 2"
    >>> zero_gradients(lambda x: x, x, y) is None
    True
    """
    if len(x) == 0:
        return None
    with _undisturbed(logits, x), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        z = logits(leaf)
        right = z.argmax(1) == y
        of_ce, of_margin = (int((_missing(loss(z, y), leaf) & right).sum()) for loss in (ce, margin))
    count = int(right.sum())
    if of_ce < 2 or 10 * of_ce <= count:
        return None
    return _flag(
        zero_gradients,
        f"cross-entropy's gradient is missing at {of_ce} of {count} correctly classified inputs, "
        f"the margin's at {of_margin}",
    )


def black_box_beats_white_box(white: Tensor, black: Tensor) -> Flag | None:
    """Attacks without gradients find what attacks with gradients did not.

        took = #{i: white_i and not black_i}

    Raised if: took > 0.2 % of the N examples (clean mistakes among them), and took >= 2. So few are found by luck, if
    the gradients had their chance: after APGD-CE and APGD-T. After PGD alone, Square takes up to 2 % of the examples in
    small networks that hide nothing.

    Explanation: Attacks that know the gradient see more than one that does not, and should leave it nothing. If they
    do, the gradients mislead them, or they gave up early, and the accuracy is an upper bound that a better attack would
    lower. Give the black-box attacks more queries and restarts, and attack what hides the gradient.

    Args:
        white: (N,) bool, right after all attacks with gradients; `verdicts.robust(k)`, if they are the first k stages.
        black: (N,) bool, right after Square or SPSA, which need not try again what was fooled; `verdicts.robust()`.

    >>> white = torch.ones(100, dtype=torch.bool)
    >>> black_box_beats_white_box(white, torch.arange(100) > 4).found
    'robust accuracy falls from 100.00 % to 95.00 %: 5 of 100 examples'
    """
    if not white.dtype == black.dtype == torch.bool or white.ndim != 1 or white.shape != black.shape:
        raise ValueError(
            f"white, black: expected bool, both of shape (N,), got {white.dtype} of {tuple(white.shape)} "
            f"and {black.dtype} of {tuple(black.shape)}"
        )
    count, robust, took = len(white), int(white.sum()), int((white & ~black).sum())
    if took < 2 or 500 * took <= count:
        return None
    return _flag(
        black_box_beats_white_box,
        f"robust accuracy falls from {100 * robust / count:.2f} % to {100 * (robust - took) / count:.2f} %: "
        f"{took} of {count} examples",
    )


def weak_pgd(
    logits: Logits, x: Tensor, y: Tensor, ball: InputBall, *, examples: int = 64, seed: int = 0
) -> Flag | None:
    """PGD of the usual length has not arrived: longer searches from other starts go on finding.

        lost = #{i: right after PGD-20, and fooled by one of 10 runs of PGD-100},    i among the first n right at x

    PGD on cross-entropy, step size eps / 4, uniform starts, every iterate looked at, as in the suites' columns. The
    first of the long runs begins where PGD-20 does, and goes on from where that ends.

    Raised if: lost >= 3 and lost > 5 % of n, so at least 4 of 64. Small networks, trained adversarially, lose 0 to 2 %
    in L-inf; at 2 %, 4 of 64 are lost by chance once in 25 batches. One lost 7 % in L2, of which APGD alone finds half:
    there PGD-20 is weak indeed. In L1, which PGD does not search, nothing is raised.

    Explanation: The loss around the inputs is so uneven that PGD stops in local maxima or passes by what it looks for,
    and how robust the network seems depends on steps and restarts. Its robust accuracy under PGD-20 is too high, and
    that under longer runs may be. Believe only attacks that have converged: more restarts and APGD, then attacks
    without gradients.

    Args:
        x: (N, ...) inside the ball's box, not chosen by what attacks did to them.
        ball: `Linf` or `L2`.
        examples: how many correctly classified inputs are attacked at most.
        seed: of the starts, which belong to an example's place in the batch.

    Cost: 1 forward of the batch; 20 gradients for each attacked input, and 1000 more for each that withstands all.

    >>> x, y = torch.full((40, 2), 0.5), torch.zeros(40, dtype=torch.long)
    >>> margin_at = lambda x, wave: (x - 0.5 + wave * (100 * (x - 0.5)).sin()).sum(1) - 0.6
    >>> weak_pgd(lambda x: torch.stack([0 * x[:, 0], margin_at(x, 0.5)], 1), x, y, Linf(0.3)).name
    'weak_pgd'
    >>> weak_pgd(lambda x: torch.stack([0 * x[:, 0], margin_at(x, 0.0)], 1), x, y, Linf(0.3)) is None
    True
    """
    if not isinstance(ball, Linf | L2) or len(x) == 0:
        return None

    def withstand(rows: Tensor, steps: int, restarts: int) -> Tensor:
        attack = Restarted(PGD(ball, ball.radius / 4, steps), restarts=restarts)
        return rows[~find(attack, logits, x[rows], y[rows], generator=PerExample(seed, rows)).fooled]

    with _undisturbed(logits, x), torch.no_grad():
        right = (logits(x).argmax(1) == y).nonzero()[:examples, 0]
        short = withstand(right, SHORT, 1)
        long = withstand(short, LONG, RESTARTS)
    lost = len(short) - len(long)
    if lost < 3 or 20 * lost <= len(right):
        return None
    return _flag(
        weak_pgd,
        f"{len(short)} of {len(right)} correctly classified inputs withstand PGD-{SHORT}, {len(long)} of them "
        f"PGD-{LONG} with {RESTARTS} restarts",
    )


def _flag(check: Callable[..., Flag | None], found: str) -> Flag:
    """A flag that carries its check's own explanation: there is no second place where it is written."""
    paragraph = (inspect.getdoc(check) or "").partition("Explanation:")[2].partition("\n\n")[0]
    return Flag(check.__name__, found, " ".join(paragraph.split()))


@contextmanager
def _undisturbed(network: Logits, x: Tensor) -> Iterator[None]:
    """What forwards inside do to the global generators and to the network's buffers is undone."""
    kept = buffers_kept(network) if isinstance(network, nn.Module) else nullcontext()
    with torch.random.fork_rng([x.device] if x.is_cuda else []), kept:
        yield


def _as_in_training(layer: _BatchNorm | _DropoutNd) -> bool:
    if isinstance(layer, _DropoutNd):
        return layer.training and layer.p > 0
    return layer.training or layer.running_mean is None


def _column_of_usual(inputs: tuple[int, ...]) -> int | None:
    if len(inputs) != 3:
        return None
    pixels = inputs[1] * inputs[2]
    return 2 if pixels > 64 * 64 else int(inputs[0] > 1 or pixels > 32 * 32)


def _missing(value: Tensor, leaf: Tensor) -> Tensor:
    """(N,) bool, which rows have no gradient of `value` (N,) that an attack could use."""
    if not value.requires_grad:  # the network cuts the graph
        return torch.ones(len(leaf), dtype=torch.bool, device=leaf.device)
    (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True, materialize_grads=True)
    rows = gradient.reshape(len(leaf), -1)
    return (rows == 0).all(1) | ~rows.isfinite().all(1)
