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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from saltflat.balls import WeightBall
from saltflat.inputs import InputAdversary
from saltflat.step import in_mode
from saltflat.weights import Where, default, perturbed


class PerturbedTrainer(Trainer):
    """A `Trainer` whose gradients are taken at attacked inputs and attacked weights.

    Args:
        ball: the weight adversary's, `Layerwise(gamma)`; None or radius 0 leaves the weights alone.
        attack: the input adversary, such as `FGSM(L2(eps, box=None))`, on what the model's input embeddings make of
            `input_ids`, (N, T, D); positions that `attention_mask` masks are left alone. None leaves the inputs alone.
        steps, step_size, where: K2, eta_2 and the weights that are perturbed, as in `perturbed`.
        start_step: optimiser steps that are taken before the weight adversary sets in.
        Everything else is `Trainer`'s.

    Both maximise `compute_loss`, a subclass's own included, in the precision that the Trainer trains in. The attack
    sees the model in eval mode; the weight adversary sees it in train mode, with a dropout of its own. A micro-batch
    costs 1 + `steps` forwards and weight gradients, and those of the attack. Weights and embeddings are given back,
    also when something raises.

    Under DistributedDataParallel v is the same everywhere in a step's last micro-batch, where gradients are averaged
    over ranks, and each rank's own in the others.

    Raises: ValueError under DataParallel and where no process holds the whole weights (FSDP, DeepSpeed, tensor
        parallel); with an attack, for encoder-decoders and `torch_compile`. Errors of `perturbed` and of the attack.

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
                value: Any = self.compute_loss(network, {**inputs}, num_items_in_batch=num_items_in_batch)
            # fp16: the scale leaves the direction as it is, and small gradients above zero.
            scaled: Tensor = value if self.accelerator.scaler is None else self.accelerator.scaler.scale(value)
            return scaled

        plain: Any = self.model  # not wrapped: its parameters have the names that the user knows
        with nullcontext() if self.attack is None else _shifted(plain, _attacked(self.attack, plain, inputs, loss)):
            if self.ball is None or self.state.global_step < self.start_step:
                return super().training_step(model, inputs, num_items_in_batch)
            with perturbed(plain, lambda: loss(model), self.ball, **self.climb):
                return super().training_step(model, inputs, num_items_in_batch)


def _attacked(attack: InputAdversary, model: Any, inputs: Any, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """u (N, T, D), zero where the mask is. The loss is a mean over the batch, whose gradient has the direction of each
    example's own.
    """
    ids = inputs["input_ids"]
    mask: Tensor = inputs.get("attention_mask", torch.ones_like(ids))[..., None]

    def f(x_adv: Tensor) -> Tensor:
        with _shifted(model, (x_adv - x) * mask):
            return loss(model)

    with in_mode(model, "eval"):
        x: Tensor = model.get_input_embeddings()(ids).detach()
        return (attack(f, x) - x) * mask


@contextmanager
def _shifted(model: Any, u: Tensor) -> Iterator[None]:
    """The model embeds x as e(x) + u inside the block. It still gets the token ids, of which some make positions, and
    the embedding its gradient.
    """
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + u)
    try:
        yield
    finally:
        hook.remove()


def _check(trainer: Trainer, attack: InputAdversary | None) -> None:
    kind, replicas = trainer.accelerator.distributed_type.value, trainer.args.n_gpu
    whole = kind == "NO" or kind.startswith("MULTI_")
    if replicas > 1 or not whole or trainer.args.parallelism_config is not None:
        raise ValueError(f"args: expected one process, or DistributedDataParallel, got {kind} with n_gpu={replicas}")
    twice = getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False)
    if attack is not None and (twice or trainer.args.torch_compile):
        raise ValueError("attack: expected a model that embeds its tokens once, without torch_compile")
