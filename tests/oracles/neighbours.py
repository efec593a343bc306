"""Adversarial weight perturbation's neighbours, each written out from its formula, tensor by tensor.

    w     the weights that may move, a dict by name;      v     the displacement, a dict by the same names
    g     the gradient at w + v, a dict;                  γ, σ, ρ   sizes relative to ‖w_l‖, to ‖w_j‖, and absolute
    loss(weights) → scalar;   losses(weights) → (N,), one value per example

Independent because the weights are a plain dict that is never put into a model: every evaluation is a function of a
fresh dict (for a model, by `torch.func.functional_call`), every gradient comes from `torch.autograd.grad`, every norm
is the root of a plain sum of squares. Nothing is changed: not the dicts given, nor a model's weights, .grad, buffers.
Every tensor in `w` is perturbed; a caller who wants only some leaves the others to the closure. Meant for float64.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.func import functional_call

Weights = dict[str, Tensor]
"""One tensor per name: weights, a displacement, a gradient, noise, an average of squares."""

Loss = Callable[[Weights], Tensor]
"""A function of the weights: a tensor without dimensions, or of shape (N,) where one value per example is asked for."""

InputLoss = Callable[[Weights, Tensor], Tensor]
"""A function of the weights and of a batch of inputs: a tensor without dimensions."""


def cross_entropies(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    """weights ↦ −log p_i[y_i] for each example, shape (N,); names that `weights` lacks are taken from the model.

    The model's buffers are copied for each evaluation, so BatchNorm in train mode updates copies that are thrown away.
    """

    def losses(weights: Weights) -> Tensor:
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        p = torch.softmax(functional_call(model, {**buffers, **weights}, (x,)), dim=1)
        return torch.stack([-torch.log(p[i, int(y[i])]) for i in range(len(y))])

    return losses


def mean_of(losses: Loss) -> Loss:
    """weights ↦ (1/N) Σ_i losses_i(weights)."""
    return lambda weights: losses(weights).mean()


def gradient(loss: Loss, w: Weights) -> Weights:
    """∇loss(w), by name; zero for a tensor that the loss does not look at."""
    leaves = {name: part.detach().clone().requires_grad_(True) for name, part in w.items()}
    parts = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if part is None else part.detach()
        for (name, leaf), part in zip(leaves.items(), parts, strict=True)
    }


def moved(w: Weights, v: Weights) -> Weights:
    """w + v; a name that `v` lacks is left where it is."""
    return {name: part.detach() + v[name] if name in v else part.detach().clone() for name, part in w.items()}


def norm(tensor: Tensor) -> float:
    """‖tensor‖ as the root of the sum of squares."""
    return float((tensor.detach() ** 2).sum().sqrt())


def global_norm(parts: Weights) -> float:
    """√(Σ_l ‖parts_l‖²)."""
    return float(sum(norm(part) ** 2 for part in parts.values()) ** 0.5)


def _zeros(w: Weights) -> Weights:
    return {name: torch.zeros_like(part.detach()) for name, part in w.items()}


def awp(loss: Loss, w: Weights, gamma: float, steps: int, step_size: float | None = None) -> Weights:
    """v_l ← Π_l(v_l + η·‖w_l‖·g_l/‖g_l‖), g = ∇loss(w + v), `steps` times from 0 with η = γ/steps; returns v.

    Π_l rescales v_l to ‖v_l‖ ≤ γ‖w_l‖, which binds only where a larger `step_size` η is given: steps of γ/steps add up
    to γ at most. A tensor whose gradient is zero keeps its v_l. Wu, Xia, Wang 2020, arXiv 2004.05884.
    """
    eta = gamma / steps if step_size is None else step_size
    v = _zeros(w)
    for _ in range(steps):
        g = gradient(loss, moved(w, v))
        for name in w:
            if norm(g[name]) == 0:
                continue
            part = v[name] + eta * norm(w[name]) * g[name] / norm(g[name])
            radius = gamma * norm(w[name])
            if norm(part) > radius:
                part = part * (radius / norm(part))
            v[name] = part
    return v


def amortised_awp(
    inner: InputLoss, w: Weights, x: Tensor, delta: Tensor, *, eps: float, step_size: float, steps: int, gamma: float
) -> tuple[Tensor, Weights]:
    """δ ← clamp(δ + α·sign ∇_x inner(w, x + δ)), `steps` times, and v_l = γ·‖w_l‖·h_l/‖h_l‖, where h is the gradient
    ∇_w inner(w, x + δ) at the δ that the last of these steps starts from; returns x + δ after it, and v.

    inner is a sum (or a mean) over the batch. The clamp is to [−ε, ε], then of x + δ to [0, 1]; the first δ is used as
    it is given. h_l = 0 gives v_l = 0. The two gradients are asked for apart, though one pass could give both.
    """
    delta = delta.detach().clone()
    for _ in range(steps):
        h = gradient(lambda weights, at=x + delta: inner(weights, at), w)
        (g,) = gradient(lambda point: inner(w, point["x"]), {"x": x + delta}).values()
        delta = torch.clamp(delta + step_size * torch.sign(g), -eps, eps)
        delta = torch.minimum(torch.maximum(delta, 0.0 - x), 1.0 - x)
    return x + delta, _along(h, w, gamma)


def robust_wp(losses: Loss, w: Weights, gamma: float, c: float, steps: int) -> Weights:
    """D ← D + ∇ (1/N) Σ_i 1[ℓ_i < c]·ℓ_i at w + v, then v = γ·‖w‖·D/‖D‖; `steps` times from D = 0, v = 0; returns v.

    The mask is found anew at every w + v and carries no gradient; an ℓ_i equal to c is masked. N counts masked examples
    too. D sums gradients of their own lengths, and both norms run over all tensors together, so v lies on the sphere
    of radius γ‖w‖ once D ≠ 0. All masked: D stays, and a D that is zero gives v = 0.
    Yu et al. 2022 (Robust Weight Perturbation), arXiv 2205.14826.
    """

    def masked(weights: Weights) -> Tensor:
        values = losses(weights)
        return values[values.detach() < c].sum() / len(values)

    total, v = _zeros(w), _zeros(w)
    for _ in range(steps):
        g = gradient(masked, moved(w, v))
        total = {name: total[name] + g[name] for name in w}
        length = global_norm(total)
        v = {name: gamma * global_norm(w) * part / length if length > 0 else 0 * part for name, part in total.items()}
    return v


def random_wp(w: Weights, sigma: float, normals: Weights) -> Weights:
    """ε_j = σ·‖w_j‖·z_j, z the standard normal draws given; E‖ε_j‖² = σ²·n_j·‖w_j‖² with n_j coordinates in w_j.

    j runs over the rows of the first dimension (filters); a tensor of one dimension or none is one filter.
    σ is per coordinate: ‖ε_j‖/‖w_j‖ is about σ√n_j. Li et al. 2022 and 2024 (Random Weight Perturbation),
    arXiv 2211.11489 and 2404.00357.
    """
    noise = {}
    for name, part in w.items():
        if part.ndim > 1:
            noise[name] = torch.stack([sigma * norm(part[j]) * normals[name][j] for j in range(len(part))])
        else:
            noise[name] = sigma * norm(part) * normals[name]
    return noise


def adaptive_random_wp(w: Weights, sigma: float, normals: Weights, F: Weights, eta: float, power: float) -> Weights:
    """`random_wp`'s noise divided by (1 + η·S)^power; the published code and the published formula differ in both.

    power = 1/2 [code]:  ε_j = σ‖w_j‖·z_j / √(1 + η·Σ F over row j): one divisor for a whole filter. In a tensor of one
        dimension the code's rows are the single coordinates, though its noise has the norm of the whole vector.
    power = 1/4 [paper]: covariance σ²‖w_j‖²/√(1 + η·F), each coordinate its own: deviation σ‖w_j‖·(1 + η·F)^(−1/4).

    F = 0 gives `random_wp`. Li et al. 2024, arXiv 2404.00357, eq. 14, as against the code that the paper names.
    """
    if power not in (0.5, 0.25):
        raise ValueError(f"power: expected 1/2 (code) or 1/4 (paper), got {power!r}")
    noise = random_wp(w, sigma, normals)
    for name, part in noise.items():
        squares = F[name]
        if power == 0.5 and part.ndim > 1:
            squares = torch.stack([torch.ones_like(squares[j]) * squares[j].sum() for j in range(len(squares))])
        noise[name] = part / (1 + eta * squares) ** power
    return noise


def fisher_update(F: Weights, g: Weights, beta: float) -> Weights:
    """β·F + g², by name, g the gradient at the perturbed weights: a sum that forgets, without a factor 1 − β."""
    return {name: beta * F[name] + g[name] ** 2 for name in F}


def mixed_random_wp(loss1: Loss, loss2: Loss, w: Weights, share: float, noise: Weights) -> Weights:
    """share·∇loss1(w + ε) + (1 − share)·∇loss2(w), loss1 and loss2 of two different batches; returns the gradient.

    Li et al. 2024 (m-RWP), arXiv 2404.00357; λ = share.
    """
    perturbed, clean = gradient(loss1, moved(w, noise)), gradient(loss2, w)
    return {name: share * perturbed[name] + (1 - share) * clean[name] for name in w}


def weighted_awp(loss: Loss, w: Weights, gamma: float, share: float, truncated_names: Collection[str]) -> Weights:
    """(1 − share)·∇loss(w) + share·∇loss(w + v), v = `awp` with one step; returns the gradient, of every tensor in `w`.

    `truncated_names` are cut off from the perturbation: v is zero there, and the other names are perturbed.
    Wu, Bojchevski, Huang 2023 (WT-AWP), arXiv 2212.04983; λ = share.
    """
    v = {name: part for name, part in awp(loss, w, gamma, steps=1).items() if name not in truncated_names}
    clean, perturbed = gradient(loss, w), gradient(loss, moved(w, v))
    return {name: (1 - share) * clean[name] + share * perturbed[name] for name in w}


def sam(loss: Loss, w: Weights, rho: float) -> tuple[Weights, Weights]:
    """v = ρ·g/‖g‖, g = ∇loss(w), the norm over all tensors together; returns v and ∇loss(w + v). g = 0 gives v = 0.

    Foret et al. 2021 (SAM), arXiv 2010.01412.
    """
    g = gradient(loss, w)
    length = global_norm(g)
    v = {name: rho * part / length if length > 0 else 0 * part for name, part in g.items()}
    return v, gradient(loss, moved(w, v))


def asam(
    loss: Loss, w: Weights, rho: float, offset: float, plain_names: Collection[str] = ()
) -> tuple[Weights, Weights]:
    """v = ρ·T²g/‖Tg‖, T = |w| + offset elementwise, the norm over all tensors; returns v and ∇loss(w + v).

    v is the maximiser of ⟨g, v⟩ under ‖v/T‖ ≤ ρ. T = 1 for `plain_names`: the authors' code has it so for every tensor
    without "weight" in its name; without such names, and with offset 0, this is the form that others' code has.
    Kwon et al. 2021 (ASAM), arXiv 2102.11600.
    """
    g = gradient(loss, w)
    scale = {
        name: torch.ones_like(part.detach()) if name in plain_names else part.detach().abs() + offset
        for name, part in w.items()
    }
    length = global_norm({name: scale[name] * g[name] for name in w})
    v = {name: rho * scale[name] ** 2 * g[name] / length if length > 0 else 0 * g[name] for name in w}
    return v, gradient(loss, moved(w, v))


def _along(direction: Weights, w: Weights, size: float) -> Weights:
    """size·‖w_l‖·d_l/‖d_l‖; zero where d_l is zero."""
    return {
        name: size * norm(part) * direction[name] / norm(direction[name]) if norm(direction[name]) > 0 else 0 * part
        for name, part in w.items()
    }


def kaggle_awp(loss: Loss, w: Weights, step_size: float, eps: float) -> Weights:
    """v_l = clamp(step_size·‖w_l‖·g_l/‖g_l‖, −eps·|w_l|, eps·|w_l|), elementwise, g = ∇loss(w); returns v.

    A weight that is zero does not move. The form that Kaggle's notebooks share; without the 10⁻⁶ that they add to both
    norms.
    """
    v = _along(gradient(loss, w), w, step_size)
    return {name: torch.minimum(torch.maximum(v[name], -eps * w[name].abs()), eps * w[name].abs()) for name in w}


def momentum_awp(direction: Weights, w: Weights, gamma: float) -> Weights:
    """v_l = γ·‖w_l‖·d_l/‖d_l‖ along a direction at hand, as an optimizer's average gradient; returns v."""
    return _along(direction, w, gamma)


def free_at(
    loss: InputLoss, w: Weights, x: Tensor, delta: Tensor, *, eps: float, lr: float, replays: int
) -> tuple[Weights, Tensor]:
    """One batch, `replays` times: g_w, g_x = ∇loss(w, x + δ), both at once; then w ← w − lr·g_w, δ ← δ + ε·sign(g_x).

    δ is then clamped to [−ε, ε] and x + δ to [0, 1], and it is this δ that is kept; the δ given, left over from the
    batch before, is brought into both first. Returns w and δ after the last replay. Plain gradient descent.
    Shafahi et al. 2019 (Free adversarial training), arXiv 1904.12843. Published code differs at the box alone: its
    authors' keeps the δ that is clamped to [−ε, ε] only and clamps the network's input, without gradient where that
    binds; Wong, Rice, Kolter's (arXiv 2001.03994) keeps δ as here, but takes the batch before's as it is.
    """

    def clamped(delta: Tensor) -> Tensor:
        return torch.clamp(x + torch.clamp(delta, -eps, eps), 0.0, 1.0) - x

    w, delta = {name: part.detach().clone() for name, part in w.items()}, clamped(delta.detach())
    for _ in range(replays):
        leaves = {name: part.clone().requires_grad_(True) for name, part in w.items()}
        x_adv = (x + delta).detach().requires_grad_(True)
        *parts, g_x = torch.autograd.grad(loss(leaves, x_adv), [*leaves.values(), x_adv])
        w = {name: w[name] - lr * part for name, part in zip(w, parts, strict=True)}
        delta = clamped(delta + eps * torch.sign(g_x))
    return w, delta


def alp(clean_logits: Tensor, attacked_logits: Tensor, y: Tensor, beta: float) -> Tensor:
    """½·(CE(z, y) + CE(z', y)) + β·(1/K) Σ_k (z_k − z'_k)² per example, shape (N,); z clean, z' attacked, K classes.

    The gradient passes through both z and z'. The pairing term is the mean over classes of the published code (a mean
    over examples and classes in the batch's loss), as is the half: its cross-entropy is the mean over 2N examples.
    Kannan, Kurakin, Goodfellow 2018 (Adversarial Logit Pairing), arXiv 1803.06373.
    """
    values = []
    for z, attacked, label in zip(clean_logits, attacked_logits, y.tolist(), strict=True):
        clean = -torch.log(torch.softmax(z, dim=0)[label])
        adversarial = -torch.log(torch.softmax(attacked, dim=0)[label])
        pairing = ((z - attacked) ** 2).sum() / len(z)
        values.append(0.5 * (clean + adversarial) + beta * pairing)
    return torch.stack(values)
