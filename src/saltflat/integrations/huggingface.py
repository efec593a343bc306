"""Both adversaries in Hugging Face's Trainer, around the gradient of a micro-batch.

    u = attack of the loss at e(x) in an input ball,    v = ascent at e(x) + u in a weight ball
    g = grad L(w + v) at e(x) + u,                      e(x) the embedded tokens

A `Trainer` shows the batch to none of its callbacks, so the adversaries stand in `training_step`, which computes the
gradient of one micro-batch. Everything else is the Trainer's own: with gradient accumulation every micro-batch has its
own u and v, and the optimiser steps after all of them, at w.

Sources: Wu, Xia, Wang, NeurIPS 2020, arXiv 2004.05884 (v); Miyato, Dai, Goodfellow, arXiv 1605.07725 (u).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import Trainer

from saltflat.balls import InputBall, Range, WeightBall
from saltflat.inputs import PGD, InputAdversary
from saltflat.integrations.micro_batches import keeping, telling
from saltflat.random import Generator
from saltflat.step import dropping, in_mode
from saltflat.weights import Ascent, Where, default, perturbed


class PerturbedTrainer(Trainer):
    """A `Trainer` whose gradients are taken at attacked inputs and attacked weights.

    Args:
        ball: the weight adversary's, `Layerwise(gamma)`; None or radius 0 leaves the weights alone.
        attack: the input adversary, such as `FGSM(L2(eps, box=None))`, on what the model's input embeddings make of
            `input_ids`, (N, T, D); positions that `attention_mask` masks are left alone, and PGD spends nothing of its
            radius there. None leaves the inputs alone.
        steps, step_size, where: K2, eta_2 and the weights that are perturbed, as in `perturbed`.
        start_step: optimiser steps that are taken before the weight adversary sets in.
        Everything else is `Trainer`'s.

    Attributes:
        ascent: what the ascent of the last micro-batch found; None where there was none.
        dropped: how many micro-batches so far had a gradient that was not finite; on the device.

    Both maximise `compute_loss`, a subclass's own included, in the precision that the Trainer trains in. It gives one
    number for the batch, and so does the f that the attack is handed, in place of (N,): enough for whoever climbs by
    its gradient (`PGD`, `FGSM`), not for an attack that compares values example by example. The attack sees the model
    in eval mode; the weight adversary sees it in train mode, with a dropout of its own. A micro-batch costs 1 + `steps`
    forwards and weight gradients, and those of the attack. Weights and embeddings are given back, also when something
    raises. A batch is prepared once: attack, ascent and descent see the same.

    A micro-batch whose gradient is not finite is left out, without waiting for the device: buffers stand as before it,
    and so do the gradients of the step's other micro-batches (a copy of them, while it runs). Two cases lose the whole
    step: with a GradScaler (fp16), which has to see what is not finite, leaves the step out and lowers its scale; and
    under DistributedDataParallel in the step's last micro-batch, whose backward averages over ranks.

    Under DistributedDataParallel v is the same everywhere in a step's last micro-batch, where gradients are averaged
    over ranks, and each rank's own in the others.

    Raises: ValueError under DataParallel and where no process holds the whole weights (FSDP, DeepSpeed, tensor
        parallel); with an attack, for encoder-decoders and compiled models, and for batches without `input_ids` or with
        any that are not (N, T), such as multiple choice. Errors of `perturbed` and of the attack.

    >>> import tempfile
    >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
    >>> from saltflat import FGSM, L2, Layerwise
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    >>> data = [{"input_ids": [1 + i, 2, 3], "labels": i % 2} for i in range(6)]
    >>> folder = tempfile.TemporaryDirectory()
    >>> arguments = TrainingArguments(
    ...     folder.name, max_steps=3, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
    ...     dataloader_pin_memory=False)
    >>> trainer = PerturbedTrainer(model, arguments, train_dataset=data, ball=Layerwise(0.01),
    ...                            attack=FGSM(L2(0.1, box=None)))
    >>> trainer.train().global_step  # doctest: +ELLIPSIS
    {...}
    3
    >>> folder.cleanup()
    """

    def __init__(
        self,
        *args: Any,
        ball: WeightBall | None,
        attack: InputAdversary | None = None,
        steps: int = 1,
        step_size: float | None = None,
        where: Where = default,
        start_step: int = 0,
        **kwargs: Any,
    ) -> None:
        if start_step < 0:
            raise ValueError(f"start_step: expected an integer >= 0, got {start_step!r}")
        super().__init__(*args, **kwargs)
        _check(self, attack)
        self.ball = None if ball is None or ball.radius == 0 else ball
        self.attack, self.start_step = attack, start_step
        self.climb: dict[str, Any] = {"steps": steps, "step_size": step_size, "where": where}
        self.ascent: Ascent | None = None
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.args.device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Adds the gradient of one micro-batch to `.grad`; returns its loss, at the attacked inputs and weights."""
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # an optimiser without schedule moves the weights here: before the ascent, not inside of it
        inputs = self._prepare_inputs(inputs)

        def loss(network: nn.Module) -> Tensor:
            with self.compute_loss_context_manager():  # autocast
                # A copy of the inputs: `compute_loss` may take the labels out.
                value: Any = self.compute_loss(network, copy(inputs), num_items_in_batch=num_items_in_batch)
            # fp16: the scale leaves the direction as it is, and small gradients above zero.
            scaled: Tensor = value if self.accelerator.scaler is None else self.accelerator.scaler.scale(value)
            return scaled

        plain: Any = self.model  # not wrapped: its parameters have the names that the user knows
        u = None if self.attack is None else _attacked(self.attack, plain, inputs, loss)
        ball = None if self.state.global_step < self.start_step else self.ball
        with nullcontext() if u is None else _shifted(plain, u):
            with nullcontext() if ball is None else perturbed(plain, lambda: loss(model), ball, **self.climb) as ascent:
                self.ascent = ascent
                drop = _leaving_out(self, plain)
                with _prepared(self):
                    found = super().training_step(model, inputs, num_items_in_batch)
        self.dropped += drop()
        return found


def _leaving_out(trainer: Trainer, model: nn.Module) -> Callable[[], Tensor]:
    """`dropping` for one micro-batch."""
    optimizer: Any = trainer.optimizer
    drop, scaler = dropping(model, optimizer), trainer.accelerator.scaler
    if scaler is not None and scaler.is_enabled():
        return telling(optimizer, drop)
    averaged = trainer.accelerator.num_processes > 1 and trainer.accelerator.sync_gradients
    return drop if averaged else keeping(optimizer, drop)  # an average with the earlier ones has nothing to keep


def _attacked(attack: InputAdversary, model: Any, inputs: Any, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """u (N, T, D), zero where the mask is. The loss is a mean over the batch, whose gradient has the direction of each
    example's own.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2:
        got = sorted(inputs) if ids is None else f"shape {tuple(ids.shape)}"
        raise ValueError(f"attack: expected a batch with input_ids of shape (N, T), got {got}")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attack: expected an attention_mask of shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
    kept = (torch.ones_like(ids) if mask is None else mask)[..., None] != 0

    def f(x_adv: Tensor) -> Tensor:
        with _shifted(model, (x_adv - x) * kept):
            return loss(model)

    if isinstance(attack, PGD):
        attack = replace(attack, ball=_Unmasked(attack.ball.radius, attack.ball, kept))
    with in_mode(model, "eval"):
        x: Tensor = model.get_input_embeddings()(ids).detach()
        return (attack(f, x) - x) * kept


@dataclass(frozen=True)
class _Unmasked:
    """{v in B : v = 0 at masked positions}: the ball of an example's own tokens, whatever stands beside them.

    Args:
        radius: of the ball.
        ball: B, of any radius.
        kept: (N, T, 1) bool, false at masked positions.
    """

    radius: float
    ball: InputBall
    kept: Tensor

    @property
    def box(self) -> Range:
        return self.ball.box

    def steepest(self, gradient: Tensor, centre: Tensor) -> Tensor:
        return self._ball().steepest(gradient, centre)  # which is zero where f has masked what it was asked

    def project(self, displacement: Tensor, centre: Tensor) -> Tensor:
        return self._ball().project(displacement * self.kept, centre)

    def sample(self, centre: Tensor, generator: Generator = None, surface: bool = False) -> Tensor:
        """Text by text, since each has a number of dimensions of its own."""
        v = torch.zeros_like(centre)
        for row, x, kept in zip(v, centre, self.kept[..., 0].cpu(), strict=True):
            if kept.any():
                row[kept] = self._ball().sample(x[kept][None], generator, surface)[0]
        return v

    def _ball(self) -> InputBall:
        return replace(self.ball, radius=self.radius)


@contextmanager
def _shifted(model: Any, u: Tensor) -> Iterator[None]:
    """The model embeds x as e(x) + u inside the block. It still gets the token ids, of which some make positions, and
    the embedding its gradient.
    """
    calls = []

    def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.shape != u.shape:
            raise ValueError(f"attack: expected embeddings of shape {tuple(u.shape)}, got {tuple(output.shape)}")
        calls.append(module)
        return output + u

    hook = model.get_input_embeddings().register_forward_hook(shift)
    try:
        yield
    finally:
        hook.remove()
    if not calls:
        raise ValueError("attack: expected a model that embeds input_ids, but its input embeddings were not asked")


@contextmanager
def _prepared(trainer: Trainer) -> Iterator[None]:
    """What is prepared is not prepared again inside the block: a subclass may draw in `_prepare_inputs`."""
    own = vars(trainer).get("_prepare_inputs")
    vars(trainer)["_prepare_inputs"] = lambda inputs: inputs
    try:
        yield
    finally:
        del vars(trainer)["_prepare_inputs"]
        if own is not None:
            vars(trainer)["_prepare_inputs"] = own


def _check(trainer: Trainer, attack: InputAdversary | None) -> None:
    kind, replicas = trainer.accelerator.distributed_type.value, trainer.args.n_gpu
    whole = kind == "NO" or kind.startswith("MULTI_")
    if replicas > 1 or not whole or trainer.args.parallelism_config is not None:
        raise ValueError(f"args: expected one process, or DistributedDataParallel, got {kind} with n_gpu={replicas}")
    if attack is None:
        return
    if (box := getattr(getattr(attack, "ball", None), "box", None)) is not None:
        raise ValueError(f"attack: embeddings lie in no box, expected a ball such as Linf(0.01, box=None), got {box}")
    model: Any = trainer.model
    # A compiled forward may have been compiled without the hook that moves the embedded tokens.
    compiled = any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules())
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or compiled or trainer.args.torch_compile:
        raise ValueError("attack: expected a model that embeds its tokens once, and is not compiled")
    try:
        model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        raise ValueError("attack: expected a model with get_input_embeddings()") from None
