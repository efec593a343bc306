"""When a robust accuracy should not be trusted: signs of it, each with what raises it and what it means.

    check(...) -> None, or Flag(name, found, explanation)

An attack that fails proves nothing. A network can make it fail without being robust: by answering at random, by giving
no gradient, by being asked in another mode, in another range or with another eps than was meant. Every function here
looks for one of these. Its docstring says under "Raised if" exactly when it speaks, with the threshold and why it lies
there, and under "Explanation" what follows; a flag carries that very paragraph. No flag proves that an accuracy is
wrong, and no silence that it is right.

All forwards are those of the network as it is given: `logits` is x' (M, ...) -> (M, C) in full or half precision, its
model in eval mode unless the user chose otherwise. Classes y are (N,) int64. An empty batch raises nothing.

No check changes anything: modes, weights, `.grad`, and torch's global generators (CPU and CUDA), which a randomised
network draws from, are as before; so are the buffers of a model that is given (a function that calls one is not looked
into). Only a generator of the network's own is advanced by what the network draws.

Sources: Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, arXiv 1802.00420;
Carlini et al., "On evaluating adversarial robustness", arXiv 1902.06705; Croce and Hein, arXiv 2003.01690, whose
AutoAttack has flags of this kind.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from saltflat.balls import L2, Box, InputBall, Linf
from saltflat.evaluation.search import Logits
from saltflat.inputs import PGD
from saltflat.objectives import ce, margin
from saltflat.random import PerExample

# The usual radius by norm, where the box is [0, 1]: small grey images (MNIST), small colour images (CIFAR, SVHN),
# larger images (ImageNet). For grey L-inf both 0.1 and 0.3 are in use.
USUAL = {"Linf": (0.1, 8 / 255, 4 / 255), "L2": (1.5, 0.5, 3.0), "L1": (10.0, 12.0, 255.0)}
POWER = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
FACTOR = 8.0


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

    Args:
        model: whose modes are looked at, and whose buffers are put back.
        logits: x' -> (M, C), the network as it is attacked; often `model` itself.
        x: (N, ...), the clean inputs.
        y: (N,) int64.
        ball: what will be searched.

    Cost: 7 forwards and 2 backwards of the batch. Changes nothing.

    >>> model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 2))
    >>> x, y = torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.long)
    >>> [flag.name for flag in before(model, model, x, y, L2(8 / 255))]
    ['train_mode', 'unusual_eps', 'randomised']
    >>> before(model.eval(), model, x, y, L2(0.5))
    []
    """
    with _undisturbed(model, x):
        found = [
            train_mode(model),
            outside_box(x, ball.box),
            unusual_eps(ball, x.shape),
            randomised(logits, x, y),
            probabilities(logits, x),
            zero_gradients(logits, x, y),
        ]
    return [flag for flag in found if flag is not None]


def randomised(logits: Logits, x: Tensor, y: Tensor, *, repeats: int = 5) -> Flag | None:
    """The same inputs do not get the same answers.

        change = max_{s,i,k} |z_s,ik - z_0,ik| / max_{s,i,k} |z_s,ik|,    z_s = logits(x), s = 0 ... repeats - 1

    Raised if: change > sqrt(eps of the logits' dtype), half of its digits: 3.5e-4 in fp32, 1.5e-8 in fp64, 0.09 in
    bf16. Additions in another order, as on a GPU, change the last digits and stay far below. So does an answer that
    flips where two logits tie within that: it is no sign of chance, and raises nothing by itself.

    Explanation: The network draws random numbers, so each query sees another network. A single gradient says little,
    an example that was fooled once may be right the next time, and attacks that compare values, APGD and Square among
    them, compare luck. Attack the expectation instead: average gradients and decisions over many draws.

    Cost: `repeats` forwards (at least 2), no backward. Changes nothing: what a randomised network draws from torch's
    global generators is given back. Chance that depends on the input alone is not seen here.

    >>> x, y = torch.rand(8, 3), torch.zeros(8, dtype=torch.long)
    >>> randomised(lambda x: x + 0.1 * torch.randn_like(x), x, y).name
    'randomised'
    >>> randomised(lambda x: x, x, y) is None
    True
    """
    if repeats < 2:
        raise ValueError(f"repeats: expected an integer >= 2, got {repeats!r}")
    if len(x) == 0:
        return None
    with _undisturbed(logits, x), torch.no_grad():
        answers = torch.stack([logits(x) for _ in range(repeats)])
    z = _raised(answers).nan_to_num()  # a logit that is not finite, and stays so, is no chance
    size, largest = (z - z[0]).abs().amax().item(), z.abs().amax().item()
    if not size > math.sqrt(torch.finfo(answers.dtype).eps) * largest:
        return None
    right = z.argmax(2) == y
    changed = (right != right[0]).any(0).sum().item()
    return _flag(
        randomised,
        f"logits of the same inputs differ by up to {size / largest:.2g} of the largest in {repeats} forwards; "
        f"{changed} of {len(x)} verdicts change",
    )


def probabilities(logits: Logits, x: Tensor) -> Flag | None:
    """The network gives probabilities where logits were expected.

    Raised if: all outputs lie in [0, 1] and every row sums to 1, up to 1e-5 or twice the rounding of the outputs'
    dtype, whichever is more (1.6e-2 in bf16); there are at least two classes. Single outputs in [0, 1] raise nothing,
    nor do log-probabilities: cross-entropy, the margin and the DLR loss are the same for z and for z - logsumexp(z).

    Explanation: The network ends in a softmax, or gives decisions as zeros and ones. A loss that takes its outputs for
    logits is then a softmax of a softmax, bounded and flat where the network is sure, and in fp32 its gradient
    vanishes. Remove the last softmax, or attack the logarithm of the outputs.

    Cost: 1 forward, no backward. Changes nothing.

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
    rounding, p = max(1e-5, 2 * torch.finfo(z.dtype).eps), _raised(z)
    within = ((p >= -rounding) & (p <= 1 + rounding)).all()
    sums = ((p.sum(1) - 1).abs() <= rounding).all()
    if z.shape[1] < 2 or not (within & sums).item():
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

    Cost: 1 forward and 2 backwards, with respect to x only. Changes nothing. The gradient is that at x itself; one that
    vanishes elsewhere only is not seen.

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
        z = _raised(logits(leaf))
        slopes = [_gradient(f.sum(), leaf) for f in (ce(z, y), margin(z, y))]
    right = z.detach().argmax(1) == y
    by_ce, by_margin = ((_missing(slope) & right).sum().item() for slope in slopes)
    count = right.sum().item()
    if by_ce < 2 or by_ce <= 0.1 * count:
        return None
    return _flag(
        zero_gradients,
        f"cross-entropy's gradient is missing at {by_ce} of {count} correctly classified inputs, "
        f"the margin's at {by_margin}",
    )


def outside_box(x: Tensor, box: Box) -> Flag | None:
    """Inputs that are no images of the range that they were said to have.

    Raised if: a number of x is NaN, or lies outside the box by more than 1e-6 of the box's width, which rounding may
    do. Without a box nothing is raised.

    Explanation: The box and the inputs disagree. Attacks clamp what they find to the box, which moves such an input
    further than eps or holds it where it is; eps has another meaning, too. Images in 0 to 255 are to be divided by 255;
    normalised ones are to be given as they were before, and to be normalised inside the model.

    Cost: no forward. Changes nothing.

    >>> outside_box(torch.tensor([[0.0, 255.0]]), (0.0, 1.0)).found
    'x goes from 0 to 255, and the box from 0 to 1; 1 of 1 inputs leave it'
    >>> outside_box(torch.tensor([[0.0, 1.0]]), (0.0, 1.0)) is None
    True
    """
    if box is None or x.numel() == 0:
        return None
    (low, high), rounding = box, 1e-6 * (box[1] - box[0])
    inside = ((x >= low - rounding) & (x <= high + rounding)).reshape(len(x), -1).all(1)  # false for NaN
    outside = (~inside).sum().item()
    if outside == 0:
        return None
    smallest, largest = (end.item() for end in x.aminmax())
    return _flag(
        outside_box,
        f"x goes from {smallest:g} to {largest:g}, and the box from {low:g} to {high:g}; "
        f"{outside} of {len(x)} inputs leave it",
    )


def train_mode(model: nn.Module) -> Flag | None:
    """Layers that behave as in training.

    Raised if: a BatchNorm module (of any kind) is in train mode or has no running statistics, or a Dropout module (of
    any kind) with p > 0 is in train mode. Dropout and BatchNorm that are called as functions are not seen here, but
    `randomised` sees the former.

    Explanation: BatchNorm then uses the statistics of the batch that it is in: an answer depends on the other inputs,
    which an attack moves as well, and on how many are left in the search. Dropout draws another network for each query.
    Neither is the network that will be used: call model.eval().

    Cost: no forward. Changes nothing.

    >>> train_mode(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())).found
    '1 of 1 BatchNorm1d, 1 of 1 Dropout: 1, 2'
    >>> train_mode(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).eval()) is None
    True
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm | _DropoutNd)]
    active = [(name, layer) for name, layer in layers if _as_in_training(layer)]
    if not active:
        return None
    of, count = Counter(_kind(layer) for _, layer in layers), Counter(_kind(layer) for _, layer in active)
    names = ", ".join(name or "the model itself" for name, _ in active[:3]) + (", ..." if len(active) > 3 else "")
    return _flag(train_mode, ", ".join(f"{n} of {of[kind]} {kind}" for kind, n in count.items()) + f": {names}")


def unusual_eps(ball: InputBall, shape: Sequence[int]) -> Flag | None:
    """A radius that looks like that of another norm, or of another range.

        r = eps / (high - low),    q = r / usual,    reach = D^(1/p) / 2    (D numbers an input, p the norm's)

        usual    (1, H, W) to 32 x 32    (C, H, W) to 64 x 64    larger images
        L-inf    0.1                     8/255                   4/255
        L2       1.5                     0.5                     3
        L1       10                      12                      255

    Raised if: q < 1/8 or q > 8, for images; or r >= reach, for inputs of any shape, when the ball around every input
    holds the middle of the box. The factor lets through all that is in use (L-inf from 1/255 to 64/255 and L2 from 1/16
    to 4 for CIFAR, L-inf from 0.5/255 to 32/255 for ImageNet, 0.1 and 0.3 for MNIST), and none of the usual mix-ups
    for colour images, of which the nearest are a factor 16 away: L2 with 8/255, L-inf with 0.5, pixels counted to 255
    in a box that ends at 1. Without a box there is no unit, and of norms other than these nothing is known: then
    nothing is raised.

    Explanation: Too small a radius makes any network look robust, and too large a one none. The usual reasons are a
    radius that belongs to another norm, and pixels counted from 0 to 255 in one place and from 0 to 1 in another. If
    the radius is meant, say so where the accuracy is published, and compare with nothing measured at another.

    Args:
        ball: `Linf`, `L2` or `L1`, with its box.
        shape: that of the batch, (N, ...).

    Cost: no forward. Changes nothing.

    >>> unusual_eps(L2(8 / 255), (10, 3, 32, 32)).found
    'eps 0.0314 in L2 is 0.0627 times the usual 0.5 for inputs (3, 32, 32); it would be usual in Linf'
    >>> unusual_eps(Linf(8 / 255), (10, 3, 32, 32)) is None
    True
    """
    norm, inputs = type(ball).__name__, tuple(shape[1:])
    if ball.box is None or norm not in USUAL:
        return None
    width, column = ball.box[1] - ball.box[0], _column_of_usual(inputs)
    eps, reach = ball.radius / width, math.prod(inputs) ** (1 / POWER[norm]) / 2
    if column is not None and not 1 / FACTOR <= eps / USUAL[norm][column] <= FACTOR:
        usual = USUAL[norm][column]
        likely = [other for other in USUAL if other != norm and 0.5 <= eps / USUAL[other][column] <= 2]
        hint = f"; it would be usual in {' and '.join(likely)}" if likely else ""
        return _flag(
            unusual_eps,
            f"eps {ball.radius:.3g} in {norm} is {eps / usual:.3g} times the usual {usual * width:.3g} "
            f"for inputs {inputs}{hint}",
        )
    if eps >= reach:
        return _flag(
            unusual_eps,
            f"eps {ball.radius:.3g} in {norm} reaches the middle of the box from every input; "
            f"for inputs {inputs} that takes {reach * width:.3g}",
        )
    return None


def black_box_beats_white_box(white: Tensor, black: Tensor) -> Flag | None:
    """Attacks without gradients find what attacks with gradients did not.

        took = #{i: white_i and not black_i}

    Raised if: took > 0.2 % of the N examples (clean mistakes among them), and took >= 2. So few are found by luck, and
    a single example says nothing.

    Explanation: An attack that knows the gradient sees more than one that does not, and should lose to it nowhere. If
    it does, the gradients mislead it, and the accuracy is an upper bound that a better attack would lower. Give the
    black-box attacks more queries and restarts, and attack what hides the gradient.

    Args:
        white: (N,) bool, right after the attacks with gradients.
        black: (N,) bool, right after Square or SPSA. Examples that were fooled before need not be tried again.

    Cost: no forward. Changes nothing.

    >>> white = torch.ones(100, dtype=torch.bool)
    >>> black_box_beats_white_box(white, torch.arange(100) > 4).found
    'robust accuracy falls from 100.00 % to 95.00 %: 5 of 100 examples'
    >>> black_box_beats_white_box(white, torch.arange(100) > 0) is None
    True
    """
    if white.dtype != torch.bool or black.dtype != torch.bool or white.ndim != 1 or white.shape != black.shape:
        raise ValueError(
            f"white, black: expected bool, both of shape (N,), got {white.dtype} of {tuple(white.shape)} "
            f"and {black.dtype} of {tuple(black.shape)}"
        )
    count, robust, took = len(white), white.sum().item(), (white & ~black.to(white.device)).sum().item()
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

    PGD on cross-entropy, step size eps / 4, uniform starts; an example is fooled if the last iterate of a run fools the
    network, which is what PGD reports.

    Raised if: lost >= 3 and lost > 5 % of n, so at least 4 of 64. In adversarially trained networks the long search
    wins some 1.5 % of the inputs; then 3 or 4 are lost by chance once in 60 batches of 64, and more rarely with fewer.
    Fewer than three inputs raise nothing.

    Explanation: The loss around the inputs is so uneven that PGD stops in local maxima or passes by what it looks for,
    and how robust the network seems depends on steps and restarts. Its robust accuracy under PGD-20 is too high, and
    that under longer runs may be. Believe only attacks that have converged: more restarts and APGD, then attacks
    without gradients.

    Args:
        x: (N, ...) inside the ball's box.
        ball: `Linf` or `L2`; for others, whose steps PGD does not know, nothing is raised.
        examples: how many correctly classified inputs are attacked at most.
        seed: of the starts, which belong to an example's place in the batch.

    Cost: 1 forward of the batch, then 21 forwards and 20 backwards an attacked example, and 1010 forwards and 1000
    backwards for each that withstands all; no gradient with respect to weights. Changes nothing. Errors are those of
    PGD: on the CPU, a ValueError for x outside the box.

    >>> x, y = torch.full((40, 2), 0.5), torch.zeros(40, dtype=torch.long)
    >>> margin_at = lambda x, wave: (x - 0.5 + wave * (100 * (x - 0.5)).sin()).sum(1) - 0.6
    >>> weak_pgd(lambda x: torch.stack([0 * x[:, 0], margin_at(x, 0.5)], 1), x, y, Linf(0.3)).name
    'weak_pgd'
    >>> weak_pgd(lambda x: torch.stack([0 * x[:, 0], margin_at(x, 0.0)], 1), x, y, Linf(0.3)) is None
    True
    """
    if not isinstance(ball, Linf | L2) or len(x) == 0:
        return None
    short, long = (PGD(ball, step_size=ball.radius / 4, steps=steps) for steps in (20, 100))
    with _undisturbed(logits, x):
        rows = _right(logits, x, y).nonzero()[:examples, 0]
        x, y, generator, robust = x[rows], y[rows], PerExample(seed, rows), []
        for attack in (short, *[long] * 10):
            kept = _withstand(attack, logits, x, y, generator)
            x, y, generator = x[kept], y[kept], generator.rows(kept)
            robust.append(len(x))
    lost = robust[0] - robust[-1]
    if lost < 3 or lost <= 0.05 * len(rows):
        return None
    return _flag(
        weak_pgd,
        f"{robust[0]} of {len(rows)} correctly classified inputs withstand PGD-20, {robust[-1]} of them PGD-100 "
        "with 10 restarts",
    )


def _flag(check: Callable[..., Flag | None], found: str) -> Flag:
    """A flag that carries its check's own explanation: there is no second place where it is written."""
    paragraph = (inspect.getdoc(check) or "").partition("Explanation:")[2].partition("\n\n")[0]
    return Flag(check.__name__, found, " ".join(paragraph.split()))


@contextmanager
def _undisturbed(network: Logits, x: Tensor) -> Iterator[None]:
    """What forwards inside do to the global generators and to the network's buffers is undone."""
    buffers = [] if not isinstance(network, nn.Module) else list(network.buffers())
    contents = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, content in zip(buffers, contents, strict=True):
                    buffer.copy_(content)


def _raised(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _right(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return logits(x).argmax(1) == y


def _withstand(attack: PGD, logits: Logits, x: Tensor, y: Tensor, generator: PerExample) -> Tensor:
    """Indices of the rows that are right after the attack; no forward if there are none to begin with."""
    if len(x) > 0:
        x = attack(lambda x_adv: ce(logits(x_adv), y), x, generator=generator)
        return _right(logits, x, y).nonzero()[:, 0]
    return torch.zeros(0, dtype=torch.long, device=x.device)


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    if not value.requires_grad:  # the network cuts the graph: no attack gets a gradient
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True, materialize_grads=True)
    return gradient


def _missing(gradient: Tensor) -> Tensor:
    rows = gradient.reshape(len(gradient), -1)
    return (rows == 0).all(1) | ~rows.isfinite().all(1)


def _as_in_training(layer: nn.Module) -> bool:
    if isinstance(layer, _DropoutNd):
        return layer.training and layer.p > 0
    return layer.training or (isinstance(layer, _BatchNorm) and layer.running_mean is None)


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__


def _column_of_usual(inputs: tuple[int, ...]) -> int | None:
    if len(inputs) != 3:
        return None
    channels, pixels = inputs[0], inputs[1] * inputs[2]
    if pixels > 64 * 64:
        return 2
    return 0 if channels == 1 and pixels <= 32 * 32 else 1
