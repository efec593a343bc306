"""The amortised form of AWP: the weights' ascent gradient is taken from the attack's last backward.

    x'_0 = x + start,   x'_{k+1} = x + P( x'_k - x + s(eta, grad_x f(x'_k)) )          k = 0 ... K1 - 2, as PGD
    (g_x, g_w) = grad_{x', w} sum_i f_i(x'; w)   at x'_{K1 - 1}                        one backward for both
    x_adv = x + P( x'_{K1 - 1} - x + s(eta, g_x) )                                     the attack's last step
    v = argmax_{v in V} <g_w, v>                                                       for AWP, gamma ‖w_l‖ g_l / ‖g_l‖
    w <- w - lr grad_w of the training loss at x_adv and w + v

f is the objective's inner loss, P and s are those of the attack's ball, V is the weight ball, which looks at the
direction of g_w alone: that of the sum over the batch is the mean's. Over adversarial training without AWP this costs
no forward and one gradient of the weights; AWP itself, a forward and a backward.

Deviation: AWP climbs on the training loss at x_adv. Here g_w is the gradient of the *inner* loss, at the iterate
*before* x_adv, and, unless `joint_mode` says otherwise, in the *attack's* mode (by default with BatchNorm's running
statistics, and without dropout). For TRADES it is that of the KL term alone, without cross-entropy; for MART that of
cross-entropy. `alignment` measures how far the two directions agree; the mode matters most to it.

Source: Wu, Xia, Wang, arXiv 2004.05884, for what it approximates; that one backward can serve both adversaries is
Shafahi et al.'s idea, arXiv 1904.12843, who descend by what is an ascent here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saltflat.balls import Global, WeightBall, Weights
from saltflat.inputs import PGD, InputAdversary, check_inputs
from saltflat.objectives import Objective, Value
from saltflat.random import Generator
from saltflat.step import Mode, Step, double_perturbation_step, in_mode, itself
from saltflat.weights import Ascent, Where, buffers_kept, chosen_weights, default, gradient, perturbed

JointMode = Literal["attack", "outer"]
PARALLEL = (  # not imported for this: where nobody has, no model is one
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
    ("torch.distributed.tensor", "DTensor"),
)


def amortised_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    objective: Objective,
    attack: InputAdversary | None,
    ball: WeightBall | None,
    optimizer: torch.optim.Optimizer,
    attack_mode: Mode = "eval",
    attack_on: Callable[[nn.Module], Callable[[Any], Tensor]] = itself,
    where: Where | None = None,
    step_inside: bool = False,
    joint_mode: JointMode = "attack",
    generator: Generator = None,
) -> Step:
    """Attack x, climb in w by the way, step down; called like `double_perturbation_step`.

    Args:
        attack: `PGD(...)`; its last step is taken here, and x_adv, in joint mode "attack", is what it would return, to
            the bit.
        ball: the weight adversary's; None or radius 0 is plain adversarial training.
        attack_on: what the attack's first K1 - 1 steps climb on. The joint gradient is that of the model itself.
        joint_mode: "attack", the joint forward is one of the attack's, in its mode; "outer", it runs in the mode that
            the model was in, as the outer loss does, and its buffers are put back: with BatchNorm, the attack's last
            step then sees the batch's statistics.
        objective, optimizer, attack_mode, where, step_inside, generator: as in `double_perturbation_step`. There are
            no further steps of the ascent (K2 > 1), no alternations, no other climb or loss to climb, no gradient at w
            (share < 1): each asks for a gradient that the attack does not have.

    The joint gradient leaves `.grad` alone. A weight tensor whose gradient is zero or not finite stays where it is and
    is counted in `skipped`; one that the inner loss does not reach, as well, without being counted. In
    attack mode "train", all K1 forwards of the attack update running statistics, the joint one included. The loss at
    w is not known: `Step.loss` is that at w + v.

    Costs for AT: K1 forwards and input gradients, of which the last gives the weights' too; then a forward and a weight
    gradient. TRADES asks for clean logits without gradient once, or twice (what the first steps climb on, and the joint
    forward) where `attack_on` or `joint_mode` is not left at its default.

    Raises: ValueError for an attack that is not `PGD`; for a model whose gradients autograd alone does not have whole:
    sharded parameters (FSDP), and `DistributedDataParallel`, whose ranks would climb along different v; for an inner
    loss that does not look at x', or reaches no weight that is perturbed.

    >>> from saltflat import AT, Layerwise, Linf
    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = amortised_step(model, torch.rand(8, 4), torch.arange(8) % 2, objective=AT(),
    ...                       attack=PGD(Linf(0.1), 0.025, 10), ball=Layerwise(5e-3), optimizer=optimizer)
    >>> bool(step.perturbed_loss == step.loss), step.skipped
    (True, tensor(0))
    """
    if ball is None or ball.radius == 0:
        return double_perturbation_step(
            model, x, y, objective=objective, attack=attack, ball=None, optimizer=optimizer, attack_mode=attack_mode,
            attack_on=attack_on, step_inside=step_inside, generator=generator,
        )  # fmt: skip
    pgd, weights, joint = _checked(attack), _differentiable(model, where), _joint_mode(model, joint_mode)
    one = attack_on is itself and joint_mode == "attack"  # function of x' serves the whole attack
    g: dict[str, Tensor] = {}

    def attacked(f: Value, x: Tensor, *, start: Tensor | None = None, generator: Generator = None) -> Tensor:
        whole = (lambda: f) if one else (lambda: objective.inner(model, x, y))
        x_adv, found = _jointly(pgd, f, whole, joint, x, weights, generator)
        g.update(found)
        return x_adv

    @contextmanager
    def climb(model: nn.Module, loss: object, ball: WeightBall, **given: Any) -> Iterator[Ascent]:
        with perturbed(model, g, ball, **given) as ascent:
            g.clear()  # while the block runs, one copy of the weights is kept, as in AWP
            yield ascent

    return double_perturbation_step(
        model, x, y, objective=objective, attack=attacked, ball=ball, optimizer=optimizer, climb=climb,
        attack_mode=attack_mode, attack_on=attack_on, where=where, step_inside=step_inside, generator=generator,
    )  # fmt: skip


def alignment(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    objective: Objective,
    attack: InputAdversary | None,
    attack_mode: Mode = "eval",
    attack_on: Callable[[nn.Module], Callable[[Any], Tensor]] = itself,
    where: Where | None = None,
    joint_mode: JointMode = "attack",
    generator: Generator = None,
) -> dict[str, Tensor]:
    """{name: cos(g_l, h_l)} for every tensor that both reach: g the amortised ascent gradient, h AWP's own, of the
    training loss at x_adv, in the mode that the model is in.

    Args: as in `amortised_step`.

    Returns: numbers in [-1, 1] without dimensions, on the device; 0 where one of the two is 0 or not finite. Averages
    are the caller's: `overall` is the one that AWP's v make of them.

    Leaves weights, buffers, `.grad` and modes as they were; the generator is advanced as by a step, and dropout draws
    from torch's own. Costs K1 + 1 forwards and two weight gradients for AT.

    >>> from saltflat import AT, Linf
    >>> _ = torch.manual_seed(0)
    >>> model, x, y = nn.Linear(4, 2), torch.rand(8, 4), torch.arange(8) % 2
    >>> found = alignment(model, x, y, objective=AT(), attack=PGD(Linf(0.1), 0.025, 10))
    >>> list(found), bool(found["weight"] > 0.99)
    (['weight'], True)
    """
    pgd, weights, joint = _checked(attack), _differentiable(model, where), _joint_mode(model, joint_mode)
    one = attack_on is itself and joint_mode == "attack"
    with buffers_kept(model):
        with in_mode(model, attack_mode):
            f = objective.inner(attack_on(model), x, y)
            whole = (lambda: f) if one else (lambda: objective.inner(model, x, y))
            x_adv, g = _jointly(pgd, f, whole, joint, x, weights, generator)
        h = gradient(model, lambda: objective.outer(model, x, x_adv, y), where=where or default)
    return {name: (_unit(g[name]) * _unit(h[name])).sum() for name in g if name in h}


def overall(model: nn.Module, cosines: Mapping[str, Tensor]) -> Tensor:
    """sum_l ‖w_l‖^2 c_l / sum_l ‖w_l‖^2: the cosine between the two displacements that `Layerwise` makes of gradients
    with these cosines, if none of them is 0.

    Raises: ValueError for no cosines.

    >>> model = nn.Linear(4, 2)
    >>> overall(model, {"weight": torch.tensor(0.5)})
    tensor(0.5000)
    """
    if not cosines:
        raise ValueError("cosines: expected at least one, got none")
    squares = torch.stack([model.get_parameter(name).detach().square().sum() for name in cosines])
    return (squares * torch.stack([*cosines.values()])).sum() / squares.sum()


def _jointly(
    attack: PGD,
    f: Value,
    whole: Callable[[], Value],
    joint: Callable[[], AbstractContextManager[None]],
    x: Tensor,
    weights: Weights,
    generator: Generator = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """x_adv, and {name: gradient of the sum of `whole`} with respect to the weights, at the iterate before it.

    Args:
        f: x' -> (N,), what the first K1 - 1 steps climb on.
        whole: gives x' -> (N,), a function of the weights too: what the last step climbs on, made and asked in a block
            of `joint`.

    Tensors that `whole` does not reach are left out.
    """
    check_inputs(attack.ball, x)
    x = x.detach()
    v = attack.start(attack.ball, x, generator)
    for _ in range(attack.steps - 1):
        g_x, _ = _gradients(f, x + v, ())
        v = attack.ahead(g_x, v, x)
    with joint():
        g_x, g_w = _gradients(whole(), x + v, weights.values())
    found = {name: g for name, g in zip(weights, g_w, strict=True) if g is not None}
    dense = {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}
    return x + attack.ahead(g_x, v, x), dense


@torch.enable_grad()
def _gradients(f: Value, x_adv: Tensor, weights: Iterable[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """That with respect to x', and those with respect to the weights, by one backward."""
    leaf = x_adv.detach().requires_grad_()
    found: tuple[Tensor | None, ...] = torch.autograd.grad(f(leaf).sum(), [leaf, *weights], allow_unused=True)
    if found[0] is None:
        raise ValueError("objective: expected an inner loss that looks at x', got one that does not")
    return found[0], found[1:]


def _differentiable(model: nn.Module, where: Where | None) -> dict[str, nn.Parameter]:
    """The weights that are perturbed and that autograd can be asked about."""
    kinds = tuple(kind for home, name in PARALLEL if (kind := getattr(sys.modules.get(home), name, None)))
    for part in (*model.modules(), *model.parameters()):
        if isinstance(part, kinds):
            raise ValueError(f"model: expected gradients that are whole without backward(), got {type(part).__name__}")
    return {name: p for name, p in chosen_weights(model, where or default).items() if p.requires_grad}


def _joint_mode(model: nn.Module, joint_mode: JointMode) -> Callable[[], AbstractContextManager[None]]:
    """A block in that mode: "outer" is how the model's modules stand now, before the attack."""
    if joint_mode not in ("attack", "outer"):
        raise ValueError(f"joint_mode: expected 'attack' or 'outer', got {joint_mode!r}")
    outer = [(module, module.training) for module in model.modules()]

    @contextmanager
    def joint() -> Iterator[None]:
        inner = [(module, module.training) for module in model.modules()]
        with buffers_kept(model):
            try:
                _set(outer)
                yield
            finally:
                _set(inner)

    return nullcontext if joint_mode == "attack" else joint


def _set(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _checked(attack: InputAdversary | None) -> PGD:
    if not isinstance(attack, PGD):
        raise ValueError(f"attack: expected PGD, whose last step is taken here, got {attack!r}")
    return attack


def _unit(g: Tensor) -> Tensor:
    return Global(1.0).steepest({"g": g}, {})["g"]
