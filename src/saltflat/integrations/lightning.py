"""Algorithm 1 around a LightningModule's own `training_step`, as a callback.

    on_train_batch_start       x' replaces x in the batch;  v climbs at x';  the weights become w + v
    training_step, backward    the module's own, at w + v
    on_after_backward          w is given back, so clipping, the optimiser and everything later see w

Lightning hands over one micro-batch at a time. With `accumulate_grad_batches=A` there is therefore one ascent a
micro-batch, and the optimiser sees sum_a grad L_a(w + v_a) / A. One v for the whole batch needs manual optimisation:
there `perturbed` is written into `training_step`, like anywhere else.

This is for the package `lightning` (2.x); `pytorch_lightning` has classes of its own.

Source: Wu, Xia, Wang, NeurIPS 2020, arXiv 2004.05884.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, MutableSequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from saltflat.balls import WeightBall
from saltflat.inputs import InputAdversary
from saltflat.objectives import Objective
from saltflat.random import seeded
from saltflat.step import Mode, in_mode
from saltflat.weights import Ascent, Closure, Where, default, perturbed

Loss = Callable[[Any, Any], Tensor]
Attack = Callable[[Any, Any], Any]


def on_images(objective: Objective, attack: InputAdversary, *, mode: Mode = "eval", seed: int = 0) -> Attack:
    """The attack on batches (x, y): (module, [x, y]) -> [x_adv, y].

    Args:
        objective: its `inner` is maximised, with the module's `forward` as the model.
        attack: `PGD(...)`, or any input adversary.
        mode: the module's mode in the attack, as in `double_perturbation_step`.
        seed: of the starts, which depend on (seed, epoch, batch) alone; resuming at an epoch needs no state.

    >>> from saltflat import AT, PGD, Linf
    >>> attack = on_images(AT(), PGD(Linf(8 / 255), 2 / 255, 10))
    """

    def attacked(module: LightningModule, batch: Any) -> list[Any]:
        x, y = batch
        generator = seeded(seed, module.current_epoch, module.trainer.fit_loop.batch_idx, device=x.device)
        with in_mode(module, mode):
            return [attack(objective.inner(module, x, y), x, generator=generator), y]

    return attacked


class DoublePerturbation(Callback):
    """Both adversaries around a module's automatic optimisation.

    Args:
        loss: (module, batch) -> scalar, what `training_step` minimises, which the weight adversary maximises. It is
            asked once for every ascent step, so it should log nothing and update no metric.
        ball: `Layerwise(gamma)`, or epoch -> ball; None or radius 0 skips the ascent. A late start is
            `lambda epoch: Layerwise(5e-3) if epoch >= 10 else None`.
        attack: (module, batch) -> the batch that `loss` and `training_step` then see, as a list or a dict; `on_images`
            makes one. TRADES needs x as well, so there it returns [x, x_adv, y], and `training_step` takes that. None
            leaves the batch alone.
        steps, step_size, where: as in `perturbed`; `where` sees the module's names, "network.0.weight".

    Attributes:
        ascent: what the last ascent found; None before there was one, and without a ball. Its `skipped` is worth a log.

    The batch must be a list or a dict (the default collation makes either): its items are replaced, and stay so, so
    that later hooks of the batch see x_adv. Tensors are never written to.

    The ascent and the attack run under the trainer's precision. With a GradScaler the ascent's gradients are scaled
    like all others, so fp16 does not lose them; a tensor whose gradient is not finite has v = 0. Hooks between the
    batch's start and its backward (the module's own `on_train_batch_start`, `on_before_backward`) run at w + v.
    Whichever way the batch ends (no backward, the epoch's end, an exception), w is given back, to the bit. An optimiser
    that asks its closure several times (LBFGS) sees w + v the first time only.

    Raises: ValueError when training starts under manual optimisation, or where the module is wrapped or runs on several
    devices, since the closure calls the module itself and v would be each rank's own; and for a batch that nothing can
    be put into.

    >>> from saltflat import AT, PGD, Layerwise, Linf
    >>> def loss(module, batch):
    ...     return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])
    >>> attack = on_images(AT(), PGD(Linf(8 / 255), 2 / 255, 10))
    >>> trainer = Trainer(callbacks=DoublePerturbation(loss, Layerwise(0.01), attack=attack), logger=False,
    ...                   enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        loss: Loss,
        ball: WeightBall | Callable[[int], WeightBall | None] | None,
        *,
        attack: Attack | None = None,
        steps: int = 1,
        step_size: float | None = None,
        where: Where = default,
    ) -> None:
        self.loss, self.ball, self.attack = loss, ball, attack
        self.steps, self.step_size, self.where = steps, step_size, where
        self.ascent: Ascent | None = None
        self._held = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError("automatic_optimization: expected True, got False; write `perturbed` into training_step")
        if trainer.world_size > 1 or trainer.strategy.model is not pl_module:
            wrapper = type(trainer.strategy).__name__
            raise ValueError(f"devices: expected 1 and no wrapper, got {trainer.world_size!r} under {wrapper}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        ball = self.ball(trainer.current_epoch) if callable(self.ball) else self.ball
        if self.attack is not None:
            with trainer.precision_plugin.forward_context():
                _put(batch, self.attack(pl_module, batch))
        self.ascent = None
        if ball is not None and ball.radius > 0:
            block = perturbed(
                pl_module,
                self._closure(trainer, pl_module, batch),
                ball,
                steps=self.steps,
                step_size=self.step_size,
                where=self.where,
            )
            self.ascent = self._held.enter_context(block)

    def _closure(self, trainer: Trainer, module: LightningModule, batch: Any) -> Closure:
        scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)

        def loss() -> Tensor:
            with trainer.precision_plugin.forward_context():
                value = self.loss(module, batch)
            if scaler is not None:
                value.register_hook(scaler.scale)  # type: ignore[no-untyped-call]  # the gradients, not the value
            return value

        return loss

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._held.close()

    # A training_step that returns None has no backward, and one that is skipped (on_train_batch_start returned -1)
    # no end of its batch.

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._held.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._held.close()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._held.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._held.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._held.close()


def _put(batch: Any, attacked: Any) -> None:
    if isinstance(batch, MutableMapping):
        batch.clear()
        batch.update(attacked)
    elif isinstance(batch, MutableSequence):
        batch[:] = attacked
    else:
        raise ValueError(f"batch: expected a list or a dict, whose items can be replaced, got {type(batch).__name__}")
