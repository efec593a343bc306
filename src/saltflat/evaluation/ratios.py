"""Differences of logits over a difference of logits: losses of attacks that no scaling of the logits changes.

    DLR           (max_{k != y} z_k - z_y) / (z_pi1 - z_pi3)
    targeted DLR  (z_t - z_y) / (z_pi1 - (z_pi3 + z_pi4) / 2)

z_pi1 >= z_pi2 >= ... are the sorted logits, t the target. Source: Croce, Hein, ICML 2020, arXiv 2003.01690, eq. 6, 7.
"""

from __future__ import annotations

from torch import Tensor

from saltflat.objectives import classes, margin, raised


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio per example; (N, C), (N,) -> (N,).

    Deviation: with fewer than three classes there is no z_pi3; then it is `margin`, which is as good a loss for attacks
    whose steps are normalised.

    >>> import torch
    >>> dlr(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
    tensor([-0.5000])
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = raised(logits).topk(3, dim=1).values
    return margin(raised(logits), y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio per example, towards the class t; (N, C), (N,), (N,) -> (N,).

    Deviation: with fewer than four classes it is z_t - z_y.

    >>> import torch
    >>> targeted_dlr(torch.tensor([[4.0, 3.0, 1.0, 1.0]]), torch.tensor([0]), torch.tensor([1]))
    tensor([-0.3333])
    """
    own = classes(y, "targeted_dlr")[:, None]
    z = raised(logits)
    difference = (z.gather(1, target[:, None]) - z.gather(1, own))[:, 0]
    if z.shape[1] < 4:
        return difference
    top = z.topk(4, dim=1).values
    return difference / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)
