"""Algorithm 1 around a LightningModule's own `training_step`, as a callback.

    on_train_batch_start       x' replaces x in the batch;  v climbs at x';  the weights become w + v
    training_step, backward    the module's own, at w + v
    on_after_backward          w is given back, so clipping, the optimiser and everything later see w;  a gradient
                               that is not finite is taken out

Lightning hands over one micro-batch at a time. With `accumulate_grad_batches=A` there is therefore one ascent a
micro-batch, and the optimiser sees sum_a grad L_a(w + v_a) / A. One v for the whole batch needs manual optimisation:
there `perturbed` is written into `training_step`, like anywhere else.

This is for the package `lightning` (2.x); `pytorch_lightning` has classes of its own.

Source: Wu, Xia, Wang, NeurIPS 2020, arXiv 2004.05884.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from saltflat.balls import WeightBall
from saltflat.inputs import InputAdversary
from saltflat.integrations.micro_batches import Drop, keeping, telling
from saltflat.objectives import Objective, Value
from saltflat.random import seeded
from saltflat.step import Mode, dropping, in_mode
from saltflat.weights import Ascent, Closure, Where, default, perturbed

Loss = Callable[[Any, Any], Tensor]
Attack = Callable[[Any, Any], Any]


def on_images(objective: Objective, attack: InputAdversary, *, mode: Mode = "eval", seed: int = 0) -> Attack:
    """The attack on batches (x, y): (module, [x, y]) -> [x_adv, y].

    Args:
        objective: its `inner` is maximised, with the module's `forward` as the model.
        attack: `PGD(...)`, or any input adversary.
        mode: the module's mode in the attack, as in `double_perturbation_step`.
        seed: of the starts, which depend on (seed, epoch, batch, rank) alone; resuming at an epoch needs no state.

    It is for training batches, through the callback or in a `training_step`: elsewhere the trainer's count of them
    stands still, and every batch of a validation would get the same draws.

    With a GradScaler what is maximised is the scaled mean over the batch, so that fp16 keeps the gradients of a network
    that is sure of itself. An attack of your own, without `on_images`, has to see to that itself.

    Raises: ValueError for a batch that is no pair.

    >>> from saltflat import AT, PGD, Linf
    >>> attack = on_images(AT(), PGD(Linf(8 / 255), 2 / 255, 10))
    """

    def attacked(module: LightningModule, batch: Any) -> list[Any]:
        if not isinstance(batch, Sequence) or len(batch) != 2:
            got = f"{len(batch)} items" if isinstance(batch, Sequence) else type(batch).__name__
            raise ValueError(f"batch: expected a pair (x, y), got {got}")
        x, y = batch
        trainer = module.trainer
        stream = (module.current_epoch, trainer.fit_loop.batch_idx, module.global_rank)
        with in_mode(module, mode):
            f = _scaled(objective.inner(module, x, y), _scaler(trainer))
            return [attack(f, x, generator=seeded(seed, *stream, device=x.device)), y]

    return attacked


def _scaled(f: Value, scaler: torch.amp.GradScaler | None) -> Value:
    """scale * f / N, as large as the training loss is: a steepest step has no use for the length of a gradient."""
    if scaler is None:
        return f

    def scaled(x_adv: Tensor) -> Tensor:
        value: Tensor = scaler.scale(f(x_adv) / len(x_adv))
        return value

    return scaled


def _scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None or not scaler.is_enabled() else scaler


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
        dropped: how many micro-batches of this training had a gradient that was not finite; on the device.

    Put it first among the trainer's callbacks: the others' `on_train_batch_start` then sees x_adv, and their
    `on_after_backward` w.

    The batch must be a list or a dict (the default collation makes either): its items are replaced, and stay so, so
    that later hooks of the batch see x_adv. Tensors are never written to. Batches that lie in memory and are handed out
    again in every epoch are safe, since Lightning moves each to the device as a list or dict of its own; a
    `transfer_batch_to_device` that hands on the very same one would have x_adv attacked in the next epoch.

    The ascent and the attack run under the trainer's precision. With a GradScaler the ascent's gradients are scaled
    like all others, so fp16 does not lose them; a tensor whose gradient is not finite has v = 0. Hooks between the
    batch's start and its backward (the module's own `on_train_batch_start`, `on_before_backward`) run at w + v, and
    cannot change the weights.

    A micro-batch whose gradient is not finite is left out, without waiting for the device: buffers stand as before it,
    and so do the gradients of the step's other micro-batches (a copy of them, while its backward runs). With a
    GradScaler, which has to see what is not finite, leaves the step out and lowers its scale, the whole step is lost.

    Whichever way the batch ends (no backward, the epoch's end, an exception), w is given back, to the bit. An optimiser
    that asks its closure several times (LBFGS) sees w + v the first time only.

    Raises: ValueError when training starts under manual optimisation, or where the module is wrapped or runs on several
    devices, since the closure calls the module itself and v would be each rank's own; and for a batch that nothing can
    be put into. RuntimeError (after w was given back) if a hook changed a weight where it stood at w + v.

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
        self.dropped = torch.zeros((), dtype=torch.int64)
        self._held = ExitStack()
        self._drop: Drop  # of the micro-batch, and of its latest backward
        self._drop_one: Drop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError("automatic_optimization: expected True, got False; write `perturbed` into training_step")
        if trainer.world_size > 1 or trainer.strategy.model is not pl_module:
            wrapper = type(trainer.strategy).__name__
            raise ValueError(f"devices: expected 1 and no wrapper, got {trainer.world_size!r} under {wrapper}")
        self.dropped = torch.zeros((), dtype=torch.int64, device=pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        ball = self.ball(trainer.current_epoch) if callable(self.ball) else self.ball
        if self.attack is not None:
            with trainer.precision_plugin.forward_context():
                _put(batch, self.attack(pl_module, batch))
        self.ascent, self._drop = None, dropping(pl_module, trainer.optimizers[0])
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
        scaler = _scaler(trainer)

        def loss() -> Tensor:
            with trainer.precision_plugin.forward_context():
                value = self.loss(module, batch)
            if scaler is not None:
                value.register_hook(scaler.scale)  # type: ignore[no-untyped-call]  # the gradients, not the value
            return value

        return loss

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # Here, since the gradients of the step before are set to zero between forward and backward.
        around = keeping if _scaler(trainer) is None else telling
        self._drop_one = around(trainer.optimizers[0], self._drop)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back()
        self.dropped += self._drop_one()
        self._drop_one = self._drop  # without the copy of the gradients

    def _give_back(self) -> None:
        try:
            self._held.close()
        except RuntimeError as error:
            raise RuntimeError(
                "a hook changed a weight between on_train_batch_start and on_after_backward, where the weights are "
                "w + v, and the change is lost: do that in on_train_batch_end"
            ) from error

    # A training_step that returns None has no backward, and one that is skipped (on_train_batch_start returned -1)
    # no end of its batch.

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._give_back()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._give_back()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._held.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back()


def _put(batch: Any, attacked: Any) -> None:
    if isinstance(batch, MutableMapping):
        items = dict(attacked)  # which may be the batch itself, with an item replaced
        batch.clear()
        batch.update(items)
    elif isinstance(batch, MutableSequence):
        batch[:] = attacked
    else:
        raise ValueError(f"batch: expected a list or a dict, whose items can be replaced, got {type(batch).__name__}")
