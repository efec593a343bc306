"""The lean form of a model that is trained: traced once, tried once, read at every attack.

A trace holds modules and tensors. Weights may change in place, as optimisers and `perturbed` do, and are read anew; if
a tensor, a module or a hook takes the place of another, there is a new trace.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saltflat.lean.fused import Fused
from saltflat.lean.layers import Layers, Untraceable, changes
from saltflat.lean.packed import supported

Logits = Callable[[Tensor], Tensor]
TOLERANCE = 1e-3  # relative, between a network and its trace in fp32, where rounding makes 1e-5
KINKS = 0.05  # the same, where rounding put some numbers on the other side of a ReLU's kink


def leaner(dtype: torch.dtype | None = None) -> Leaner:
    """model -> (x' -> logits), for `attack_on`: reads the weights of a model as they stand, and gives back what
    computes its logits up to rounding, in fewer operations. Its gradient is that with respect to x'
    (`torch.autograd.grad`): convolutions and norms have none of the weights.

    Args:
        dtype: `torch.bfloat16` for convolutions in it, as under autocast, with logits in it; None for fp32, under
            autocast as well.

    What is found out about a model is remembered, for one model at a time: which operations it consists of, and whether
    they give the same logits and the same gradient, which is tried on the first batch. Where they don't, or there is no
    telling, the model itself is what comes back, and `why` says why: modules in train mode, a GPU, a forward that is
    decided by numbers, hooks on the whole, no oneDNN. What a forward draws, or reads from Python attributes that
    change, is not seen once the trial has passed; a NaN may be lost at a ReLU. A trace is made with torch.fx, which
    disturbs forwards of other threads meanwhile.

    While an attack runs, it holds about four copies of the weights: in fp32 and folded, and packed for both directions;
    of 3 x 3 convolutions with 512 channels or more eight (`winograd`).

    Raises: ValueError for another dtype.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()).eval()
    >>> x, attack_on = torch.rand(2, 1, 4, 4), leaner()
    >>> bool(torch.allclose(attack_on(model)(x), model(x), atol=1e-6)), attack_on.why
    (True, None)
    """
    return Leaner(dtype)


class Leaner:
    """See `leaner`. Copies, also through pickle, begin without memory."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype: expected torch.bfloat16 or None, got {dtype!r}")
        self.dtype = dtype
        self._known: _Known | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Leaner, (self.dtype,)

    @property
    def why(self) -> str | None:
        """Why the last model is climbed on itself; None if it is not, or there was none."""
        return None if self._known is None else self._known.why

    def __call__(self, model: nn.Module) -> Logits:
        known = self._known
        if known is None or not known.is_of(model):
            known = self._known = _Known(model, self.dtype, self._forget)
        return known.logits(model)

    def _forget(self, _: object) -> None:
        self._known = None


class _Known:
    """What is known of a model, as it is put together now."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, forget: Callable[[Any], None]) -> None:
        self.model, self.print, self.dtype = weakref.ref(model, forget), _fingerprint(model), dtype
        # held, so that nothing else can come to lie where one of them was
        self.held = [part for module in model.modules() for part in (module, *changes(module)) if part is not model]
        self.layers: Layers | None = None
        self.tried, self.why = False, _hindrance(model, dtype)
        if self.why is None:
            try:
                self.layers = Layers(model)
            except Untraceable as error:
                self.why = f"no trace: {error}"

    def is_of(self, model: nn.Module) -> bool:
        return self.model() is model and self.print == _fingerprint(model)

    def logits(self, model: nn.Module) -> Logits:
        if self.layers is None:
            return model
        fused = Fused(self.layers, self.dtype)
        return fused if self.tried else lambda x: self._tried(model, fused, x)

    def _tried(self, model: nn.Module, fused: Fused, x: Tensor) -> Tensor:
        if self.layers is not None and not self.tried:
            agree = _agree(model, self.layers, x)
            if agree is None:  # no telling by this batch: the next will be tried
                z: Tensor = model(x)
                return z
            self.tried = agree
            if not agree:
                self.layers, self.why = None, "a trace that gives other answers"
        found: Tensor = model(x) if self.layers is None else fused(x)
        return found


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """What a trace holds of it; numbers in tensors may change."""
    modules = tuple((id(m), type(m), m.training, *map(id, changes(m))) for m in model.modules())
    return modules, tuple((id(tensor), tensor.dtype, tensor.device) for tensor in _tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _hindrance(model: nn.Module, dtype: torch.dtype | None) -> str | None:
    if any(module.training for module in model.modules()):
        return "modules in train mode"
    if any(tensor.device.type != "cpu" for tensor in _tensors(model)):
        return "not on a CPU"
    if any(tensor.is_floating_point() and tensor.dtype is not torch.float32 for tensor in _tensors(model)):
        return "weights of another type than fp32"
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return "no convolutions"
    return None if supported(dtype or torch.float32) else f"no oneDNN for {dtype or torch.float32} on this machine"


def _agree(model: nn.Module, layers: Layers, x: Tensor) -> bool | None:
    """Whether logits, and the gradient of a sum of them with weights, are the same; None if this batch cannot tell.

    A ReLU that rounding switches on or off moves the gradient of its example by up to some hundredths, in a network and
    in its trace alike; so the gradients of most examples have to be the same, and all together nearly so.
    """
    try:
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            expected, found = _answers(model, x), _answers(Fused(layers, None), x)
    except Exception:  # of the trace; or of the model, which will say so itself
        return False
    if not all(0 < other.norm() < torch.inf for other in expected):
        return None
    if any(one.shape != other.shape for one, other in zip(found, expected, strict=True)):
        return False
    (logits, wanted), (gradient, wanted_gradient) = zip(found, expected, strict=True)
    difference = (gradient - wanted_gradient).flatten(1).norm(dim=1)
    same = difference <= TOLERANCE * wanted_gradient.flatten(1).norm(dim=1)
    return (
        bool((logits - wanted).norm() <= TOLERANCE * wanted.norm())
        and bool(difference.norm() <= KINKS * wanted_gradient.norm())
        and bool(2 * same.sum() > len(same))
    )


def _answers(logits: Logits, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    z = logits(leaf)
    (gradient,) = torch.autograd.grad((z * torch.linspace(1, 2, z.numel()).view(z.shape)).sum(), leaf)
    return z.detach(), gradient
