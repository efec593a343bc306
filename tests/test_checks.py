"""Each check has networks that must trip it and networks that must not, also near its threshold."""

import inspect
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from networks import convolutional
from torch import nn

from saltflat import AT, L2, PGD, Linf
from saltflat.balls import L1
from saltflat.data import digits, to_float
from saltflat.evaluation import checks
from saltflat.evaluation.checks import (
    before,
    black_box_beats_white_box,
    outside_box,
    probabilities,
    randomised,
    train_mode,
    unusual_eps,
    weak_pgd,
    zero_gradients,
)
from saltflat.evaluation.suite import chained, evaluate, pgd, square, standard
from saltflat.models import mlp

CIFAR, MNIST, IMAGENET = (8, 3, 32, 32), (8, 1, 28, 28), (8, 3, 224, 224)
CHECKS = [
    check
    for name, check in inspect.getmembers(checks, inspect.isfunction)
    if check.__module__ == checks.__name__ and name[0] != "_" and check is not before
]


def batch(n=20, classes=4, dtype=torch.float64):
    """Inputs that are logits themselves, and the classes that these choose."""
    x = torch.rand(n, classes, dtype=dtype)
    return x, x.argmax(1)


def identity(x):
    return x


# --- networks, and what a check says of them ---


def only(model, *training):
    """In eval mode but for these modules."""
    model.eval()
    for name in training:
        model.get_submodule(name).train()
    return model


def answers(change, dtype):
    """Logits of which the largest is 1, and one of which differs by `change` in the second forward only."""
    calls = []

    def logits(x):
        calls.append(x)
        z = (x / x[1:].max()).clamp(max=1).to(dtype)
        z[0, 0] = 0.5 + (change if len(calls) == 2 else 0)
        return z

    return logits


def noisy(x):
    return x + 0.1 * torch.randn_like(x)


def reseeded(x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return noisy(x)


def masked(logits):
    """The last class is never chosen."""
    return lambda x: torch.cat([logits(x)[:, :-1], torch.full_like(x[:, :1], -torch.inf)], 1)


def tied(dtype):
    """The first two logits tie, and rounding decides, now so and now so."""
    calls = []

    def logits(x):
        calls.append(x)
        z = torch.ones(len(x), 3, dtype=dtype)
        z[:, len(calls) % 2] += torch.finfo(dtype).eps
        return z

    return logits


def deciding_otherwise(rows):
    """Zeros and ones; the second forward chooses other classes for the first rows."""
    calls = []

    def logits(x):
        calls.append(x)
        z = F.one_hot(x.argmax(1), x.shape[1]).to(x.dtype)
        return torch.cat([z[:rows].roll(1, 1), z[rows:]]) if len(calls) == 2 else z

    return logits


def now_and_then_nan():
    calls = []
    return lambda x: calls.append(x) or (x * torch.nan if len(calls) == 3 else x)


def said_of_answers(logits, **options):
    x, y = batch(**options)
    return randomised(logits, x, y)


def summing_to(total):
    """Rows in [0, 1] with this sum."""
    return lambda x: x / x.sum(1, keepdim=True) * total


def said_of_outputs(logits, **options):
    return probabilities(logits, batch(**options)[0])


class Through(torch.autograd.Function):
    """round(x), with the gradient of x."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def without_gradient(*rows):
    """The identity, which gives the inputs of these rows no gradient."""

    def logits(x):
        hidden = torch.zeros(len(x), 1, dtype=torch.bool)
        hidden[list(rows)] = True
        return torch.where(hidden, x.detach(), x)

    return logits


def by(margin):
    """All inputs are right by this margin."""
    return lambda x: torch.stack([x[:, 0] - x[:, 0].detach() + margin, x[:, 1] - x[:, 1].detach()], 1)


def said_of_gradients(logits, y=None, **options):
    x, right = batch(**options)
    if y is not None:
        return zero_gradients(logits, x, torch.full_like(right, y))
    with torch.no_grad():
        return zero_gradients(logits, x, logits(x).argmax(1))


def verdicts(n, took):
    """A tenth is wrong already; of the rest so many are fooled without gradients."""
    white = torch.arange(n) >= n // 10
    return white, white & (torch.arange(n) < n - took)


class Rounds(nn.Module):
    """Two classes; z_1 - z_0 = <a, x>, rounded to a grid: stairs without a gradient."""

    def __init__(self, a, grid):
        super().__init__()
        self.a, self.grid = nn.Parameter(a), grid

    def climbed(self, z):
        return z if self.grid == 0 else (z / self.grid).round() * self.grid

    def forward(self, x):
        z = self.climbed(x.flatten(1) @ self.a)
        return torch.stack([torch.zeros_like(z), z], 1)


class Misleads(Rounds):
    """The right values, and gradients that point the other way."""

    def climbed(self, z):
        return 2 * z.detach() - z


def said_of_attacks(network, ball, **options):
    """Networks whose inputs take 0 to 1.3 times what the ball can give to be fooled; PGD-20, then Square."""
    a = torch.randn(48, dtype=torch.float64)
    gain = ball.radius * (a.abs().sum() if isinstance(ball, Linf) else a.norm())
    x = 0.4 + 0.2 * torch.rand(60, 48, dtype=torch.float64)
    needed = gain * torch.linspace(0.01, 1.3, 60, dtype=torch.float64)
    x = x - ((x @ a + needed) / a.square().sum())[:, None] * a
    column = chained("both", [pgd(ball, 20, ball.radius / 4), square(ball, 150)])
    model, y = network(a, **options), torch.zeros(60, dtype=torch.long)
    *_, last = evaluate(model, x.view(60, 3, 4, 4), y, [column])
    of = last.verdicts["both"]
    return black_box_beats_white_box(of.robust(1), of.robust())


LOCKS, CENTRE = 12, 0.5


def unlocking(eps):
    """Two classes. Each number of x can be climbed by only while all before it stand near CENTRE + eps, and class 1
    wins when all do. In L-inf a number takes up to eight steps of eps / 4, so that 20 are too few and 100 enough.

    The first number of x, which has no gradient, tells who can be fooled: those near 0.8 so, those near 0.5 at once.
    """

    def logits(x):
        v = (x[:, 1:] - CENTRE) / eps
        open_so_far = (v > 0.9).double().cumprod(1)
        reach = torch.cat([torch.ones_like(v[:, :1]), open_so_far[:, :-1]], 1)
        z = (reach * v).sum(1) - (LOCKS - 0.15)
        z = torch.where(x[:, 0] > 0.65, z, 0.1 * v.sum(1) - 2 * LOCKS)
        z = torch.where((x[:, 0] - 0.5).abs() < 0.15, v.sum(1) - 0.9 * LOCKS, z)
        return torch.stack([torch.zeros_like(z), z], 1)

    return logits


def said_of_locks(n, opening, easy=0, wrong=0, **options):
    """n inputs that are right and before them `wrong` ones that are not; the last ones can be fooled."""
    x = torch.full((wrong + n, 1 + LOCKS), CENTRE, dtype=torch.float64)
    x[:, 0] = torch.tensor([0.2] * (wrong + n - easy - opening) + [0.5] * easy + [0.8] * opening)
    y = (torch.arange(wrong + n) < wrong).long()
    return weak_pgd(unlocking(0.1), x, y, Linf(0.1), **options)


def said_of_waves(ball, wave, offset=1.0, **options):
    """The margin rises by at most 0.3 sqrt(2) (L2) or 0.6 (L-inf), under waves whose tops are no better than others."""

    def logits(x):
        z = (x - 0.5 + wave * (100 * (x - 0.5)).sin()).sum(1) - offset
        return torch.stack([torch.zeros_like(z), z], 1)

    return weak_pgd(logits, torch.full((40, 2), 0.5), torch.zeros(40, dtype=torch.long), ball, **options)


@dataclass(frozen=True)
class Other(Linf):
    """A ball of which nothing is known."""


def inside(layer):
    return nn.Sequential(nn.Identity(), nn.Sequential(layer))


TRIPS = {
    "train_mode": {
        "BatchNorm": lambda: train_mode(nn.Sequential(nn.BatchNorm2d(3)).train()),
        "BatchNorm deep inside, alone": lambda: train_mode(only(inside(nn.BatchNorm1d(3)), "1.0")),
        "BatchNorm over processes": lambda: train_mode(only(inside(nn.SyncBatchNorm(3)), "1.0")),
        "BatchNorm without statistics, in eval mode": lambda: train_mode(
            inside(nn.BatchNorm2d(3, track_running_stats=False)).eval()
        ),
        "Dropout": lambda: train_mode(only(inside(nn.Dropout(1e-3)), "1.0")),
        "alpha dropout": lambda: train_mode(inside(nn.AlphaDropout(0.1))),
        "dropout of channels": lambda: train_mode(inside(nn.Dropout2d(0.1))),
        "a layer that is the model": lambda: train_mode(nn.Dropout()),
    },
    "outside_box": {
        "0 to 255": lambda: outside_box(255 * torch.rand(4, 3, 2, 2), (0.0, 1.0)),
        "bytes": lambda: outside_box(torch.full((2, 3), 200, dtype=torch.uint8), (0.0, 1.0)),
        "normalised": lambda: outside_box((torch.rand(4, 3, 8, 8) - 0.5) / 0.25, (0.0, 1.0)),
        "one number of one input": lambda: outside_box(torch.eye(9)[None] * 1.1, (0.0, 1.0)),
        "NaN": lambda: outside_box(torch.tensor([[0.5, torch.nan], [0.5, 0.5]]), (0.0, 1.0)),
        "infinite": lambda: outside_box(torch.tensor([[0.5, torch.inf]]), (0.0, 1.0)),
        "-1 to 1 in a box from 0": lambda: outside_box(torch.linspace(-1, 1, 9)[:, None], (0.0, 1.0)),
        "above by 1.1e-6": lambda: outside_box(torch.tensor([[1 + 1.1e-6]], dtype=torch.float64), (0.0, 1.0)),
        "below by 1.1e-6": lambda: outside_box(torch.tensor([[-1.1e-6]], dtype=torch.float64), (0.0, 1.0)),
        "bf16": lambda: outside_box(torch.tensor([[1.01]], dtype=torch.bfloat16), (0.0, 1.0)),
    },
    "unusual_eps": {
        "8 for 8/255": lambda: unusual_eps(Linf(8), CIFAR),
        "8/255 for 8": lambda: unusual_eps(Linf(8 / 255, (0.0, 255.0)), CIFAR),
        "L2 with L-inf's": lambda: unusual_eps(L2(8 / 255), CIFAR),
        "L-inf with L2's": lambda: unusual_eps(Linf(0.5), CIFAR),
        "L1 with L2's": lambda: unusual_eps(L1(0.5), CIFAR),
        "L2 with L1's": lambda: unusual_eps(L2(12.0), CIFAR),
        "grey, L2 with L-inf's": lambda: unusual_eps(L2(0.1), MNIST),
        "grey, L-inf with L2's": lambda: unusual_eps(Linf(1.5), MNIST),
        "large, L2 with L-inf's": lambda: unusual_eps(L2(4 / 255), IMAGENET),
        "large, L-inf with L2's": lambda: unusual_eps(Linf(3.0), IMAGENET),
        "64 x 64 are not large": lambda: unusual_eps(L1(255.0), (8, 3, 64, 64)),
        "33 x 33 grey ones are not small": lambda: unusual_eps(Linf(0.35), (8, 1, 33, 33)),
        "none": lambda: unusual_eps(Linf(0.0), CIFAR),
        "10.1 times too large": lambda: unusual_eps(L2(5.05), CIFAR),
        "10.1 times too small": lambda: unusual_eps(L2(0.5 / 10.1), CIFAR),
        "vectors, L-inf": lambda: unusual_eps(Linf(0.5), (8, 16)),
        "vectors, L2": lambda: unusual_eps(L2(2.0), (8, 16)),
        "vectors, L1": lambda: unusual_eps(L1(8.0), (8, 16)),
        "vectors in another box": lambda: unusual_eps(L2(4.0, (-1.0, 1.0)), (8, 16)),
        "grey images of few pixels": lambda: unusual_eps(Linf(0.5), (8, 1, 2, 2)),
    },
    "randomised": {
        "noise": lambda: said_of_answers(noisy),
        "noise in one logit of one input": lambda: said_of_answers(
            lambda x: torch.cat([x[:-1], x[-1:] + torch.randn(1, 1) * torch.eye(4)[:1]])
        ),
        "noise before the network": lambda: said_of_answers(lambda x: noisy(x).softmax(1).log()),
        "dropout": lambda: said_of_answers(nn.Dropout(0.2)),
        "dropout as a function": lambda: said_of_answers(lambda x: F.dropout(x, 0.2)),
        "noise beside a class that is masked": lambda: said_of_answers(masked(noisy)),
        "a network that counts": lambda: said_of_answers(now_and_then_nan()),
        "bf16": lambda: said_of_answers(lambda x: x + torch.randn_like(x), dtype=torch.bfloat16),
        "just enough in fp32": lambda: said_of_answers(answers(3.6e-4, torch.float32)),
        "just enough in fp64": lambda: said_of_answers(answers(1.6e-8, torch.float64)),
        "just enough in bf16": lambda: said_of_answers(answers(0.1, torch.bfloat16)),
    },
    "probabilities": {
        "softmax in fp32": lambda: said_of_outputs(lambda x: x.softmax(1), dtype=torch.float32),
        "softmax in fp64": lambda: said_of_outputs(lambda x: x.softmax(1)),
        "softmax in fp16": lambda: said_of_outputs(lambda x: x.softmax(1).half()),
        "softmax in bf16": lambda: said_of_outputs(lambda x: x.softmax(1), classes=100, dtype=torch.bfloat16),
        "softmax of a thousand": lambda: said_of_outputs(lambda x: x.softmax(1), classes=1000, dtype=torch.float32),
        "softmax of two": lambda: said_of_outputs(lambda x: x.softmax(1), classes=2),
        "softmax that is sure": lambda: said_of_outputs(lambda x: (1e4 * x).softmax(1)),
        "decisions": lambda: said_of_outputs(lambda x: F.one_hot(x.argmax(1), 4).double()),
        "rounded below 0": lambda: said_of_outputs(lambda x: torch.stack([0 * x[:, 0] - 1e-6, 0 * x[:, 1] + 1], 1)),
        "a sum of 1 + 9e-6": lambda: said_of_outputs(summing_to(1 + 9e-6)),
        "a sum of 1 - 9e-6": lambda: said_of_outputs(summing_to(1 - 9e-6)),
    },
    "zero_gradients": {
        "inputs rounded": lambda: said_of_gradients(lambda x: (4 * x).round()),
        "inputs rounded to few bits": lambda: said_of_gradients(lambda x: (255 * x).byte().double() / 255),
        "inputs rounded in bf16": lambda: said_of_gradients(lambda x: x.round(), dtype=torch.bfloat16),
        "thresholds": lambda: said_of_gradients(lambda x: (x > 0.5).double()),
        "decisions": lambda: said_of_gradients(lambda x: F.one_hot(x.argmax(1), 4).double()),
        "a graph that is cut": lambda: said_of_gradients(lambda x: x.detach()),
        "a graph that is cut before weights": lambda: said_of_gradients(
            lambda x: x.detach() * torch.ones(4, dtype=x.dtype, requires_grad=True)
        ),
        "no gradients in the forward": lambda: said_of_gradients(torch.no_grad()(lambda x: 2 * x)),
        "inference only": lambda: said_of_gradients(torch.inference_mode()(lambda x: 2 * x)),
        "NaN in the backward": lambda: said_of_gradients(lambda x: x + (0 * x).sqrt()),
        "a margin of 110 in fp32": lambda: said_of_gradients(by(110.0), dtype=torch.float32),
        "logits of 1e4": lambda: said_of_gradients(lambda x: 1e6 * x),
        "two classes": lambda: said_of_gradients(lambda x: x.round(), classes=2),
        "two of two": lambda: said_of_gradients(without_gradient(0, 1), n=2),
        "three of 29": lambda: said_of_gradients(without_gradient(0, 7, 28), n=29),
    },
    "black_box_beats_white_box": {
        "three of 1000": lambda: black_box_beats_white_box(*verdicts(1000, 3)),
        "two of 999": lambda: black_box_beats_white_box(*verdicts(999, 2)),
        "two of two": lambda: black_box_beats_white_box(torch.tensor([True, True]), torch.tensor([False, False])),
        "stairs, L-inf": lambda: said_of_attacks(Rounds, Linf(0.1), grid=0.1),
        "stairs, L2": lambda: said_of_attacks(Rounds, L2(0.5), grid=0.1),
        "gradients that mislead, L-inf": lambda: said_of_attacks(Misleads, Linf(0.1), grid=0),
    },
    "weak_pgd": {
        "waves, L-inf": lambda: said_of_waves(Linf(0.3), 0.5),
        "waves, L2": lambda: said_of_waves(L2(0.3), 0.3, offset=0.75),
        "four of 64": lambda: said_of_locks(64, 4),
        "three of 59": lambda: said_of_locks(59, 3),
        "three of three, among others that are wrong": lambda: said_of_locks(3, 3, wrong=70),
    },
}

SILENT = {
    "train_mode": {
        "eval mode": lambda: train_mode(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Linear(2, 2)).eval()),
        "its layers alone in eval mode": lambda: train_mode(
            nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Dropout().eval())
        ),
        "Dropout with p = 0": lambda: train_mode(nn.Sequential(nn.Dropout(0.0), nn.AlphaDropout(0.0))),
        "other norms": lambda: train_mode(
            nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), nn.LocalResponseNorm(2))
        ),
        "nothing to train": lambda: train_mode(nn.Sequential(nn.Flatten(), nn.ReLU())),
    },
    "outside_box": {
        "the whole box": lambda: outside_box(torch.tensor([[0.0, 1.0]]), (0.0, 1.0)),
        "0 to 255 in their box": lambda: outside_box(torch.tensor([[0.0, 255.0]]), (0.0, 255.0)),
        "-1 to 1 in their box": lambda: outside_box(torch.linspace(-1, 1, 9)[:, None], (-1.0, 1.0)),
        "the next number above": lambda: outside_box(torch.ones(1, 1).nextafter(torch.tensor(2.0)), (0.0, 1.0)),
        "above by 0.9e-6": lambda: outside_box(torch.tensor([[1 + 0.9e-6]], dtype=torch.float64), (0.0, 1.0)),
        "below by 0.9e-6": lambda: outside_box(torch.tensor([[-0.9e-6]], dtype=torch.float64), (0.0, 1.0)),
        "above 255 by 2e-4": lambda: outside_box(torch.tensor([[255 + 2e-4]], dtype=torch.float64), (0.0, 255.0)),
        "bf16": lambda: outside_box(torch.rand(4, 9).bfloat16(), (0.0, 1.0)),
        "no box": lambda: outside_box(torch.tensor([[-5.0, torch.nan]]), None),
        "no numbers": lambda: outside_box(torch.zeros(3, 0), (0.0, 1.0)),
    },
    "unusual_eps": {
        "9.9 times the usual": lambda: unusual_eps(L2(4.95), CIFAR),
        "the usual by 9.9": lambda: unusual_eps(L2(0.5 / 9.9), CIFAR),
        "no box": lambda: unusual_eps(Linf(8, None), CIFAR),
        "another ball": lambda: unusual_eps(Other(8), CIFAR),
        "vectors, L-inf": lambda: unusual_eps(Linf(0.49), (8, 16)),
        "vectors, L2": lambda: unusual_eps(L2(1.99), (8, 16)),
        "vectors, L1": lambda: unusual_eps(L1(7.9), (8, 16)),
        "vectors, hardly any": lambda: unusual_eps(Linf(1e-9), (8, 16)),
        **{
            f"{ball}, {shape[1:]}": lambda ball=ball, shape=shape: unusual_eps(ball, shape)
            for shape, balls in {
                CIFAR: [*(Linf(k / 255) for k in (1, 2, 4, 8, 16, 64)), L2(1 / 16), L2(0.5), L2(4.0), L1(12.0)],
                MNIST: [Linf(0.1), Linf(0.3), L2(1.5), L2(2.0), L1(10.0)],
                (8, 3, 64, 64): [Linf(8 / 255), L2(0.5)],
                (8, 3, 65, 64): [L1(255.0)],
                (8, 1, 64, 64): [Linf(8 / 255), L2(0.5)],
                (8, 1, 32, 32): [Linf(0.35)],
                IMAGENET: [Linf(0.5 / 255), Linf(4 / 255), Linf(32 / 255), L2(3.0), L1(60.0), L1(255.0)],
                (8, 1, 8, 8): [Linf(0.15), L2(1.0)],
            }.items()
            for ball in balls
        },
        "8 of 255": lambda: unusual_eps(Linf(8.0, (0.0, 255.0)), CIFAR),
        "8/255 of a box of width 2": lambda: unusual_eps(Linf(16 / 255, (-1.0, 1.0)), CIFAR),
    },
    "randomised": {
        "the same each time": lambda: said_of_answers(identity),
        "noise that is the same each time": lambda: said_of_answers(reseeded),
        "BatchNorm in train mode": lambda: said_of_answers(nn.BatchNorm1d(4).double().train()),
        "dropout with p = 0": lambda: said_of_answers(nn.Dropout(0.0)),
        "a class that is masked": lambda: said_of_answers(masked(identity)),
        "nothing but NaN": lambda: said_of_answers(lambda x: x * torch.nan),
        "nothing but zeros": lambda: said_of_answers(lambda x: 0 * x),
        "ties in fp32": lambda: said_of_answers(tied(torch.float32)),
        "ties in bf16": lambda: said_of_answers(tied(torch.bfloat16)),
        "not enough in fp32": lambda: said_of_answers(answers(3.3e-4, torch.float32)),
        "not enough in fp64": lambda: said_of_answers(answers(1.4e-8, torch.float64)),
        "not enough in bf16": lambda: said_of_answers(answers(0.08, torch.bfloat16)),
    },
    "probabilities": {
        "logits": lambda: said_of_outputs(identity),
        "log-softmax": lambda: said_of_outputs(lambda x: x.log_softmax(1)),
        "large logits": lambda: said_of_outputs(lambda x: 1e4 * x),
        "sigmoids": lambda: said_of_outputs(lambda x: x.sigmoid()),
        "one row that is none": lambda: said_of_outputs(
            lambda x: torch.cat([x[:-1].softmax(1), 2 * x[-1:].softmax(1)])
        ),
        "rows that sum to 1, but not of probabilities": lambda: said_of_outputs(
            lambda x: torch.stack([x[:, 0] * 0 - 0.2] + [x[:, 0] * 0 + 0.4] * 3, 1)
        ),
        "a sum of 1 + 1.1e-5": lambda: said_of_outputs(summing_to(1 + 1.1e-5)),
        "a sum of 1 - 1.1e-5": lambda: said_of_outputs(summing_to(1 - 1.1e-5)),
        "NaN": lambda: said_of_outputs(lambda x: x * torch.nan),
    },
    "zero_gradients": {
        "linear": lambda: said_of_gradients(identity),
        "log-softmax": lambda: said_of_gradients(lambda x: x.log_softmax(1)),
        "softmax": lambda: said_of_gradients(lambda x: x.softmax(1)),
        "inputs rounded, with a gradient": lambda: said_of_gradients(Through.apply),
        "a margin of 80 in fp32": lambda: said_of_gradients(by(80.0), dtype=torch.float32),
        "a margin of 700 in fp64": lambda: said_of_gradients(by(700.0)),
        "a margin of 80 in bf16": lambda: said_of_gradients(by(80.0), dtype=torch.bfloat16),
        "tiny gradients": lambda: said_of_gradients(lambda x: 1e-30 * x, dtype=torch.float32),
        "all inputs wrong": lambda: said_of_gradients(lambda x: F.one_hot(0 * x[:, 0].long(), 4) + 0 * x, y=1),
        "inputs rounded in one row of ten": lambda: said_of_gradients(without_gradient(3), n=10),
        "one of one": lambda: said_of_gradients(without_gradient(0), n=1),
        "two of 20": lambda: said_of_gradients(without_gradient(0, 7), n=20),
        "three of 30": lambda: said_of_gradients(without_gradient(0, 7, 28), n=30),
    },
    "black_box_beats_white_box": {
        "two of 1000": lambda: black_box_beats_white_box(*verdicts(1000, 2)),
        "one of three": lambda: black_box_beats_white_box(*verdicts(3, 1)),
        "the same": lambda: black_box_beats_white_box(*verdicts(50, 0)),
        "others are fooled by gradients alone": lambda: black_box_beats_white_box(*reversed(verdicts(50, 9))),
        "linear, L-inf": lambda: said_of_attacks(Rounds, Linf(0.1), grid=0),
        "linear, L2": lambda: said_of_attacks(Rounds, L2(0.5), grid=0),
    },
    "weak_pgd": {
        "linear, L-inf, nearly robust": lambda: said_of_waves(Linf(0.3), 0.0, offset=0.59),
        "linear, L-inf, just robust": lambda: said_of_waves(Linf(0.3), 0.0, offset=0.61),
        "linear, L2, nearly robust": lambda: said_of_waves(L2(0.3), 0.0, offset=0.42),
        "linear, L2, just robust": lambda: said_of_waves(L2(0.3), 0.0, offset=0.43),
        "waves, L1": lambda: said_of_waves(L1(0.3), 0.5),
        "waves under which all are fooled": lambda: said_of_waves(Linf(0.3), 0.5, offset=0.01),
        "waves under which none can be": lambda: said_of_waves(Linf(0.3), 0.5, offset=1.7),
        "three of 64": lambda: said_of_locks(64, 3),
        "three of 60": lambda: said_of_locks(60, 3),
        "three of 60, of which half are easy": lambda: said_of_locks(60, 3, easy=30),
        "two of two": lambda: said_of_locks(2, 2),
        "none but those that are wrong": lambda: said_of_locks(0, 0, wrong=9),
        "beyond those that are attacked": lambda: said_of_locks(40, 9, examples=31),
    },
}


def each(table):
    return pytest.mark.parametrize(
        ("name", "ask"),
        [pytest.param(name, ask, id=f"{name}-{label}") for name, rows in table.items() for label, ask in rows.items()],
    )


@each(TRIPS)
def test_it_speaks_of(name, ask):
    flag = ask()
    assert flag is not None
    assert flag.name == name
    assert flag.found
    assert "\n" not in flag.found


@each(SILENT)
def test_it_says_nothing_of(name, ask):
    assert ask() is None


def test_every_check_has_such_networks():
    assert {check.__name__ for check in CHECKS} == set(TRIPS) == set(SILENT)
    assert min(len(rows) for table in (TRIPS, SILENT) for rows in table.values()) >= 5


# --- figures ---


@pytest.mark.parametrize(
    ("ask", "found"),
    [
        (lambda: train_mode(nn.Sequential(*[nn.Dropout() for _ in range(3)], nn.BatchNorm1d(2).eval())),
         "3 of 4 modules: 0 (Dropout), 1 (Dropout), 2 (Dropout)"),
        (lambda: train_mode(nn.Sequential(*[nn.Dropout() for _ in range(4)])),
         "4 of 4 modules: 0 (Dropout), 1 (Dropout), 2 (Dropout), ..."),
        (lambda: train_mode(nn.Dropout()), "1 of 1 modules: model (Dropout)"),
        (lambda: outside_box(torch.tensor([[0.5, 1.5], [0.5, 0.5], [-1.0, 0.5]]), (0.0, 1.0)),
         "x goes from -1 to 1.5, and the box from 0 to 1; 2 of 3 inputs leave it"),
        (lambda: outside_box(torch.tensor([[torch.nan], [0.5]]), (0.0, 1.0)),
         "x goes from nan to nan, and the box from 0 to 1; 1 of 2 inputs leave it"),
        (lambda: unusual_eps(Linf(8), CIFAR), "eps 8 in Linf is 255 times the usual 0.0314 for inputs (3, 32, 32); "
         "it would be usual in L1"),
        (lambda: unusual_eps(Linf(0.1, (0.0, 100.0)), CIFAR),
         "eps 0.1 in Linf is 0.0319 times the usual 3.14 for inputs (3, 32, 32)"),
        (lambda: unusual_eps(L2(6.0, (0.0, 3.0)), (8, 16)),
         "eps 6 in L2 reaches the middle of the box from every input; for inputs (16,) that takes 6"),
        (lambda: said_of_answers(answers(0.25, torch.float64), n=5),
         "logits of the same inputs differ by up to 0.25 of the largest in 5 forwards; 0 of 5 verdicts change"),
        (lambda: said_of_answers(deciding_otherwise(3), n=5),
         "logits of the same inputs differ by up to 1 of the largest in 5 forwards; 3 of 5 verdicts change"),
        (lambda: said_of_outputs(lambda x: x.softmax(1), n=7),
         "the outputs of all 7 inputs lie in [0, 1] and sum to 1"),
        (lambda: said_of_gradients(by(1e6), n=6),
         "cross-entropy's gradient is missing at 6 of 6 correctly classified inputs, the margin's at 0"),
        (lambda: said_of_gradients(without_gradient(0, 7, 28), n=29),
         "cross-entropy's gradient is missing at 3 of 29 correctly classified inputs, the margin's at 3"),
        (lambda: black_box_beats_white_box(*verdicts(1000, 50)),
         "robust accuracy falls from 90.00 % to 85.00 %: 50 of 1000 examples"),
        (lambda: said_of_locks(60, 7, wrong=3),
         "60 of 60 correctly classified inputs withstand PGD-20, 53 of them PGD-100 with 10 restarts"),
        (lambda: said_of_locks(60, 7, easy=20),
         "40 of 60 correctly classified inputs withstand PGD-20, 33 of them PGD-100 with 10 restarts"),
        (lambda: said_of_locks(60, 7, wrong=3, examples=56),
         "56 of 56 correctly classified inputs withstand PGD-20, 53 of them PGD-100 with 10 restarts"),
    ],
)  # fmt: skip
def test_what_was_found_is_said_with_its_figures(ask, found):
    assert ask().found == found


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=1200), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_black_box_beats_white_box_by_the_examples_that_it_alone_fools(pairs, few):
    pairs = [(white, black or not white or i >= few) for i, (white, black) in enumerate(pairs)] if few else pairs
    took = sum(white and not black for white, black in pairs)
    flag = black_box_beats_white_box(*(torch.tensor(column) for column in zip(*pairs, strict=True)))
    assert (flag is not None) == (took >= 2 and took / len(pairs) > 0.002)
    assert flag is None or flag.found.endswith(f": {took} of {len(pairs)} examples")


@pytest.mark.parametrize(
    ("white", "black"),
    [
        (torch.ones(3), torch.ones(3)),
        (torch.ones(3, dtype=torch.bool), torch.ones(3)),
        (torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)),
        (torch.ones(3, 1, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool)),
    ],
)
def test_verdicts_of_another_form_are_refused(white, black):
    with pytest.raises(ValueError, match=r"white, black: expected bool, both of shape \(N,\), got"):
        black_box_beats_white_box(white, black)


# --- what is promised of all ---


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_flag_carries_the_explanation_of_its_docstring(check):
    text = inspect.getdoc(check)
    assert text.count("Raised if: ") == text.count("Explanation: ") == 1
    assert text.index("Raised if: ") < text.index("Explanation: ")
    paragraph = next(part for part in text.split("\n\n") if part.startswith("Explanation: "))
    flag = next(iter(TRIPS[check.__name__].values()))()
    assert flag.explanation == " ".join(paragraph.removeprefix("Explanation: ").split())
    assert flag.explanation.endswith(".")


def test_without_docstrings_there_is_no_explanation(monkeypatch):
    monkeypatch.setattr(outside_box, "__doc__", None)
    assert outside_box(torch.full((1, 1), 2.0), (0.0, 1.0)).explanation == ""


class Restless(nn.Module):
    """Draws, counts in a buffer in place and in one that it replaces, moves its running statistics; fails if told."""

    def __init__(self, forwards=10_000):
        super().__init__()
        self.network, self.dropout, self.forwards, self.calls = convolutional(), nn.Dropout(0.2), forwards, 0
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls += 1
        if self.calls > self.forwards:
            raise ArithmeticError("enough")
        self.in_place += 1
        self.replaced = self.replaced + 1
        if self.nothing is None:
            self.nothing = torch.ones(())
        return self.network(self.dropout(x))


ASKED = {
    "train_mode": lambda model, x, y: train_mode(model),
    "outside_box": lambda model, x, y: outside_box(x, (0.0, 1.0)),
    "unusual_eps": lambda model, x, y: unusual_eps(Linf(0.1), x.shape),
    "randomised": lambda model, x, y: randomised(model, x, y),
    "probabilities": lambda model, x, y: probabilities(model, x),
    "zero_gradients": lambda model, x, y: zero_gradients(model, x, y),
    "black_box_beats_white_box": lambda model, x, y: black_box_beats_white_box(y > 0, y > 1),
    "weak_pgd": lambda model, x, y: weak_pgd(model, x, y, Linf(1e-9)),
    "before": lambda model, x, y: before(model, model, x, y, Linf(0.1)),
    "before, of a function": lambda model, x, y: before(model, lambda x: model(x), x, y, Linf(0.1)),
}  # fmt: skip


def everything_of(model, *tensors):
    """Values and identities of what a check could change, and the next random number."""
    generator = torch.random.get_rng_state()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    kept = [*model.buffers(), *model.parameters(), *gradients, *tensors]
    values = [None if tensor is None else tensor.detach().clone() for tensor in kept]
    return generator, modes, [id(tensor) for tensor in kept], values, model.nothing


def assert_equal(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1:3] == other[1:3]
    assert all(a is b or torch.equal(a, b) for a, b in zip(one[3], other[3], strict=True))
    assert one[4] is other[4]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ASKED)
def test_nothing_is_changed(name, mode):
    model = Restless()
    model.train(mode == "train").network[1].train(mode == "eval")
    x = torch.rand(6, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
    model.nothing = None
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.rand_like(parameter) if number % 2 else None
    gradients_are_on, kept = torch.is_grad_enabled(), everything_of(model, x, y)
    ASKED[name](model, x, y)
    assert_equal(everything_of(model, x, y), kept)
    assert torch.is_grad_enabled() == gradients_are_on
    assert not x.requires_grad


@pytest.mark.parametrize("forwards", [0, 1, 4])
@pytest.mark.parametrize("name", ["randomised", "probabilities", "zero_gradients", "weak_pgd", "before"])
def test_nothing_is_changed_when_the_network_fails(name, forwards):
    model = Restless(forwards if name in ("randomised", "weak_pgd", "before") else 0)
    x = torch.rand(6, 3, 6, 6, dtype=torch.float64)
    kept = everything_of(model, x)
    with pytest.raises(ArithmeticError, match="enough"):
        ASKED[name](model, x, torch.arange(6) % 3)
    assert_equal(everything_of(model, x), kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("n", [0, 1, 12])
@pytest.mark.parametrize("ball", [Linf(0.03), L2(0.2)])
def test_honest_networks_of_any_precision_raise_nothing(dtype, classes, n, ball):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).to(dtype).eval()
    x = torch.rand(n, 3, 4, 4, dtype=dtype)
    with torch.no_grad():
        y = model(x).argmax(1) if n else torch.zeros(0, dtype=torch.long)
    assert before(model, model, x, y, ball) == []
    assert weak_pgd(model, x, y, ball) is None
    assert black_box_beats_white_box(y >= 0, y >= 0) is None


@pytest.fixture(scope="module")
def trained():
    """A small network trained adversarially on digits, and test images."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data, model = digits(), mlp(hidden=(64,))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(8):
        for rows in torch.randperm(len(data.train)).split(100):
            x, y = to_float(data.train.images[rows]), data.train.labels[rows]
            x = PGD(Linf(0.1), 0.04, 4)(AT().inner(model, x, y), x)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), to_float(data.test.images[:100]), data.test.labels[:100]


def test_a_network_trained_adversarially_raises_nothing(trained):
    model, x, y = trained
    ball = Linf(0.1)
    assert before(model, model, x, y, ball) == []
    assert weak_pgd(model, x, y, ball, examples=40) is None
    column = standard(ball, steps=20, queries=200)
    *_, last = evaluate(model, x, y, [column])
    white, black = (last.verdicts["standard"].robust(stages) for stages in (len(column.stages) - 1, None))
    assert 0.2 < black.double().mean() < 0.9  # it is robust, and not to all
    assert black_box_beats_white_box(white, black) is None


def test_the_same_network_is_seen_through_what_hides_its_gradient(trained):
    model, x, y = trained
    hidden = nn.Sequential(model, Stairs())
    ball = Linf(0.1)
    assert [flag.name for flag in before(hidden, hidden, x, y, ball)] == ["zero_gradients"]
    *_, last = evaluate(hidden, x, y, [pgd(ball, 20, 0.025), square(ball, 200)])
    white, black = (last.verdicts[name].robust() for name in ("pgd-20", "square"))
    assert black_box_beats_white_box(white, black).name == "black_box_beats_white_box"


class Stairs(nn.Module):
    def forward(self, z):
        return (8 * z).round() / 8


# --- before ---


class CountsBackwards(torch.autograd.Function):
    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        CountsBackwards.count += 1
        return gradient


def test_before_says_everything_in_order():
    model = nn.Sequential(nn.Flatten(), Stairs(), nn.Linear(48, 3), nn.Dropout(0.2), nn.Softmax(1))
    x = 255 * torch.rand(20, 3, 4, 4)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    flags = before(model.train(), model, x, y, Linf(8))
    assert [flag.name for flag in flags] == [
        "train_mode", "outside_box", "unusual_eps", "randomised", "probabilities", "zero_gradients",
    ]  # fmt: skip


def test_before_takes_seven_forwards_and_two_backwards_of_the_batch():
    sizes, gradients = [], []
    model = convolutional().eval()

    def logits(x):
        sizes.append(len(x))
        gradients.append(torch.is_grad_enabled())
        return model(CountsBackwards.apply(x))

    CountsBackwards.count = 0
    x = torch.rand(9, 3, 6, 6, dtype=torch.float64)
    before(model, logits, x, torch.arange(9) % 3, Linf(0.03))
    assert sizes == [9] * 7
    assert CountsBackwards.count == 2
    assert sum(gradients) == 1


def test_before_looks_at_what_is_attacked_and_not_at_the_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    x, y = torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.long)
    flags = before(model, lambda x: model(x).softmax(1), x, y, Linf(0.03))
    assert [flag.name for flag in flags] == ["probabilities"]


# --- weak_pgd ---


def test_weak_pgd_draws_by_its_seed_and_by_nothing_else():
    """Inputs whose fate hangs on the start: as many of them are found again, whatever was drawn in between."""

    def found(seed):
        torch.rand(3)
        return said_of_waves(Linf(0.3), 0.5, seed=seed).found

    first = [found(seed) for seed in range(3)]
    assert len(set(first)) > 1
    assert [found(seed) for seed in range(3)] == first


@pytest.mark.parametrize(
    ("kind", "y", "most"),
    [
        (0.8, 0, 10 * (1 + 21) + 10 * (101 + 1)),  # fooled in the first long run, at the latest at its end
        (0.5, 0, 10 * (1 + 9 + 1)),  # fooled after eight steps at most; no long run is begun
        (0.8, 1, 10),  # wrong without an attack
    ],
)
def test_weak_pgd_goes_on_only_with_those_that_withstand(kind, y, most):
    rows, model = [], unlocking(0.1)
    x = torch.full((10, 1 + LOCKS), CENTRE, dtype=torch.float64)
    x[:, 0] = kind
    weak_pgd(lambda x: rows.append(len(x)) or model(x), x, torch.full((10,), y), Linf(0.1))
    assert 0.5 * most < sum(rows) <= most
