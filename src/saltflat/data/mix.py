"""Softer labels and mixed examples: a batch (x, y) becomes a batch (x~, y~), before any adversary looks at it.

    smoothed   y~ = (1 - amount) onehot(y) + amount / C
    mixup      x~ = lam x + (1 - lam) x[pi]            y~ = lam y + (1 - lam) y[pi]
    cutmix     x~ = x outside of a box, x[pi] in it    y~ = lam y + (1 - lam) y[pi],   lam = area outside / (H W)

with lam ~ Beta(alpha, alpha), and the box's area and place, drawn once a batch, and pi a random permutation of it.
Sources: Szegedy et al., arXiv 1512.00567, section 7 (smoothing); Zhang et al., arXiv 1710.09412 (mixup); Yun et al.,
arXiv 1905.04899 (CutMix).

The attack, the ascent in the weights and the descent are handed one and the same (x~, y~). If a loss mixed by itself,
each of its calls would be about other examples, and the weight adversary would climb another function than the one that
the optimiser descends.

Draws come from the given generator alone. If it is on the device of x, nothing waits for that device: lam, the box and
pi stay tensors.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed(y: Tensor, num_classes: int, amount: float) -> Tensor:
    """(1 - amount) onehot(y) + amount / C, the labels of Szegedy et al. (arXiv 1512.00567, section 7).

    Args:
        y: (N,) int64 classes in 0 ... C - 1, or (N, C) probabilities, which then take the place of onehot(y).
        num_classes: C.
        amount: in [0, 1]; 0 gives onehot(y), 1 the same for every class.

    Returns: (N, C) probabilities, of torch's default dtype for classes and of y's for probabilities.

    Raises ValueError for an amount outside of [0, 1], and for a y of another shape or type. Classes themselves are
    looked at by `torch.nn.functional.one_hot`.

    >>> smoothed(torch.tensor([1]), 4, 0.2)
    tensor([[0.0500, 0.8500, 0.0500, 0.0500]])
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount: expected a number in [0, 1], got {amount!r}")
    if y.ndim == 1 and y.dtype == torch.int64:
        y = F.one_hot(y, num_classes).to(torch.get_default_dtype())
    elif y.ndim != 2 or y.shape[1] != num_classes or not y.is_floating_point():
        raise ValueError(
            f"y: expected (N,) int64 or (N, {num_classes}) probabilities, got {y.dtype} of shape {tuple(y.shape)}"
        )
    return (1 - amount) * y + amount / num_classes


def mixup(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """lam x + (1 - lam) x[pi] and lam y + (1 - lam) y[pi], with one lam ~ Beta(alpha, alpha) and one permutation pi
    (Zhang et al., arXiv 1710.09412).

    Args:
        x: (N, C, H, W), floating, in [0, 1].
        y: (N, classes) probabilities, floating: `smoothed` makes them of classes.
        alpha: > 0, no unit. Small: nearly all of one example; 1: any share is as likely; large: halves.
        generator: moved by two uniform numbers for lam, and by pi (`torch.randperm`).

    Returns: new tensors of the shapes and dtypes of x and y. The images stay in [0, 1] to the bit, and images that are
    equal to their partners stay what they are; the rows of the labels sum to 1 up to rounding.

    Raises ValueError for shapes and types that are not these, and for an alpha that is not positive and finite.

    >>> x, y = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), smoothed(torch.tensor([0, 1]), 2, 0.0)
    >>> x, y = mixup(x, y, alpha=1.0, generator=torch.Generator().manual_seed(0))
    >>> torch.equal(x.flatten(), y[:, 1])  # a label says how much of its class an image shows
    True
    """
    _check(x, y)
    lam = symmetric_beta(alpha, generator).to(x.device)
    partner = _permutation(x, generator)
    return _mixed(x, partner, lam), _mixed(y, partner, lam)


def cutmix(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every image with one box of its partner x[pi], the same box for the whole batch; lam y + (1 - lam) y[pi] with lam
    the share of pixels that are left (Yun et al., arXiv 1905.04899).

    With lam0 ~ Beta(alpha, alpha) the box has H sqrt(1 - lam0) rows and W sqrt(1 - lam0) columns, rounded to whole
    ones; its centre is uniform over the pixels, and what lies outside of the image is cut off. So lam, counted after
    that, is at least lam0 up to rounding.

    Args:
        x: (N, C, H, W), floating.
        y: (N, classes) probabilities, floating: `smoothed` makes them of classes.
        alpha: > 0, no unit; 1 in the paper.
        generator: moved by two uniform numbers for lam0, two for the centre, and by pi (`torch.randperm`).

    Returns: new tensors of the shapes and dtypes of x and y: pixels are those of x or x[pi] to the bit, and the rows of
    the labels sum to 1 up to rounding.

    Raises ValueError for shapes and types that are not these, and for an alpha that is not positive and finite.

    >>> x, y = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8), smoothed(torch.tensor([0, 1]), 2, 0.0)
    >>> x, y = cutmix(x, y, alpha=1.0, generator=torch.Generator().manual_seed(0))
    >>> torch.equal(x.mean((1, 2, 3)), y[:, 1])
    True
    """
    _check(x, y)
    lam0 = symmetric_beta(alpha, generator).to(x.device)
    down, right = _uniform(2, generator).to(x.device).unbind()
    partner = _permutation(x, generator)
    rows, columns = (_covered(size, lam0, u) for size, u in zip(x.shape[2:], (down, right), strict=True))
    box = rows[:, None] & columns
    return torch.where(box, x[partner], x), _mixed(y, partner, (~box).double().mean())


def symmetric_beta(alpha: float, generator: torch.Generator) -> Tensor:
    """lam ~ Beta(alpha, alpha): a scalar in fp64 on the generator's device, of two uniform numbers u, v.

        lam = (1 + c / sqrt(c^2 + 1 / s)) / 2,    c = cos(2 pi v),    s = u^(-1 / alpha) - 1

    since c sqrt(2 alpha s) is Student's t with n = 2 alpha degrees of freedom (Bailey, "Polar generation of random
    variates with the t-distribution", Mathematics of Computation 62, 1994), and (1 + t / sqrt(n + t^2)) / 2 is
    Beta(n / 2, n / 2). No draw is rejected, for no alpha > 0, so that nobody has to look at one.

    Raises ValueError for an alpha that is not positive and finite.

    >>> 0 <= symmetric_beta(0.2, torch.Generator().manual_seed(0)) <= 1
    tensor(True)
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a finite number > 0, got {alpha!r}")
    u, v = _uniform(2, generator).unbind()
    c, s = (2 * math.pi * v).cos(), ((1 - u).log().abs() / alpha).expm1()  # 1 - u is never 0
    return (1 + c / (c.square() + s.reciprocal()).sqrt()) / 2


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating images (N, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    if y.ndim != 2 or len(y) != len(x) or not y.is_floating_point():
        raise ValueError(
            f"y: expected probabilities of shape ({len(x)}, classes), got {y.dtype} of shape {tuple(y.shape)}"
        )


def _mixed(values: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """lam a + (1 - lam) a[pi]. `lerp` walks from the nearer end, half of the way at most, so rounding never leads past
    either end, and from an end to itself it does not move.
    """
    return values[partner].lerp(values, lam.to(values.dtype))


def _covered(size: int, lam0: Tensor, u: Tensor) -> Tensor:
    """Which of `size` rows, or columns, a box of round(size sqrt(1 - lam0)) of them around number floor(size u) covers:
    (size,) bool.
    """
    extent = (size * (1 - lam0).sqrt()).round()
    first = (size * u).floor() - (extent / 2).floor()
    index = torch.arange(size, device=u.device)
    return (index >= first) & (index < first + extent)


def _uniform(number: int, generator: torch.Generator) -> Tensor:
    return torch.rand(number, dtype=torch.float64, generator=generator, device=generator.device)


def _permutation(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
