"""`PerturbedTrainer` against a plain loop: a small BERT on bytes of text, with weights and embedded inputs attacked."""

import contextlib
import copy
import io
import multiprocessing
import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ParallelismConfig
from networks import equal_states, state
from torch import distributed
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from examples import hf_trainer
from saltflat import FGSM, L2, PGD, Box, Layerwise, Linf, perturbed
from saltflat.inputs import gaussian, uniform, zero
from saltflat.integrations.huggingface import PerturbedTrainer
from saltflat.weights import default

LINES = [
    "Simple is better than complex.", "Complex is better than complicated.", "Flat is better than nested.",
    "Sparse is better than dense.", "Readability counts.", "Now is better than never.",
    "Although never is often better than right now.", "Errors should never pass silently.",
]  # fmt: skip
LENGTH = 40
ATTACK = PGD(L2(0.5, box=None), step_size=0.2, steps=3, start=zero)


class Lines(torch.utils.data.IterableDataset):
    """Bytes and padding, again and again, in one order."""

    def __iter__(self):
        while True:
            for label, line in enumerate(LINES):
                ids = torch.tensor([1 + byte for byte in line.encode()[:LENGTH]])
                padding = (0, LENGTH - len(ids))
                mask = F.pad(torch.ones_like(ids), padding)
                yield {"input_ids": F.pad(ids, padding), "attention_mask": mask, "labels": label % 3}


def bert(dropout=0.0):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**sizes, vocab_size=257, max_position_embeddings=LENGTH, num_labels=3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return BertForSequenceClassification(config).double()


def mean_loss(outputs, labels, num_items_in_batch=None):
    """Means over all micro-batches of a step, whatever a version of the Trainer takes for granted."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def trainer(folder, model, micro_batches=1, max_steps=4, kind=PerturbedTrainer, arguments=None, **given):
    settings = {
        "max_steps": max_steps, "gradient_accumulation_steps": micro_batches, "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "use_cpu": True, "dataloader_pin_memory": False,
        "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return kind(
        model,
        TrainingArguments(str(folder), **settings | (arguments or {})),
        **{"train_dataset": Lines(), "compute_loss_func": mean_loss, "optimizers": (optimizer, None)} | given,
    )


def fit(fitting):
    with contextlib.redirect_stdout(io.StringIO()):
        fitting.train()


def trained(*args, **given):
    fit(trainer(*args, **given))


def plain_loop(model, micro_batches=1, max_steps=4, ball=None, attack=None, start_step=0, left_out=(), **climb):
    """What the Trainer should do, without it: `inputs_embeds` stand where it has `input_ids`. Micro-batches that are
    left out are those whose first label is among `left_out`.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    batches = iter(torch.utils.data.DataLoader(Lines(), batch_size=4))
    for step in range(max_steps):
        for _ in range(micro_batches):
            batch = next(batches)
            ids, mask, y = batch["input_ids"], batch["attention_mask"], batch["labels"]
            if y[0] in left_out:
                continue

            def logits(u, ids=ids, mask=mask):
                shifted = model.get_input_embeddings()(ids) + u * mask[..., None]
                return model(inputs_embeds=shifted, attention_mask=mask).logits

            u = torch.zeros(4, LENGTH, 32, dtype=torch.float64)
            if attack is not None:
                model.eval()
                u = attack(lambda u, logits=logits, y=y: F.cross_entropy(logits(u), y, reduction="none"), u)
                model.train()

            def loss(u=u, logits=logits, y=y):
                return F.cross_entropy(logits(u), y, reduction="sum") / (4 * micro_batches)

            if ball is None or step < start_step:
                loss().backward()
            else:
                with perturbed(model, loss, ball, **climb):
                    loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@torch.no_grad()
def distance(one, other):
    return max((p - q).abs().max().item() for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "adversaries",
    [
        {"ball": Layerwise(0.05)},
        {"ball": Box(0.01), "steps": 3, "step_size": 0.005},
        {"ball": Layerwise(0.05), "start_step": 2},
        {"ball": Layerwise(0.05), "where": lambda name, parameter: "word_embeddings" in name},
        {"ball": None, "attack": ATTACK},
        {"ball": Layerwise(0.05), "attack": ATTACK},
    ],
    ids=["AWP", "three steps in a box", "warm-up", "embeddings only", "inputs only", "both"],
)
def test_weights_are_those_of_a_plain_loop(tmp_path, adversaries, micro_batches):
    """To the bit; but for an attack, whose u is the rounded difference of e(x) + u and e(x) in the Trainer."""
    model = bert()
    expected = copy.deepcopy(model)
    plain_loop(expected, micro_batches, **adversaries)
    trained(tmp_path, model, micro_batches, **adversaries)
    assert distance(model, bert()) > 1e-3
    assert distance(model, expected) <= (1e-15 if "attack" in adversaries else 0)


def test_without_adversaries_it_is_the_trainer_to_the_bit(tmp_path):
    one, other = bert(dropout=0.3), bert(dropout=0.3)
    trained(tmp_path, one, ball=Layerwise(0.0))
    trained(tmp_path, other, kind=Trainer)
    assert equal_states(state(one), state(other))


def test_steps_before_start_step_are_the_trainers(tmp_path):
    late, plain, early = bert(), bert(), bert()
    trained(tmp_path, late, ball=Layerwise(0.05), start_step=4)
    trained(tmp_path, plain, ball=None)
    trained(tmp_path, early, ball=Layerwise(0.05), start_step=3)
    assert equal_states(state(late), state(plain))
    assert not equal_states(state(early), state(plain))


def test_mixed_precision_is_that_of_the_trainer(tmp_path):
    """The climb's forward runs in autocast like the other one, as in a plain loop under autocast."""
    model = bert().float()
    expected = copy.deepcopy(model)
    batches = iter(torch.utils.data.DataLoader(Lines(), batch_size=4))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def loss(batch):
        with torch.autocast("cpu", torch.bfloat16):
            logits = expected(batch["input_ids"], batch["attention_mask"]).logits
        return F.cross_entropy(logits.float(), batch["labels"], reduction="sum") / 4

    for batch in (next(batches), next(batches)):
        with perturbed(expected, lambda batch=batch: loss(batch), Layerwise(0.05)):
            loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained(tmp_path, model, max_steps=2, arguments={"bf16": True}, ball=Layerwise(0.05))
    assert equal_states(state(model), state(expected))


def test_a_gradient_scaler_scales_the_climb_as_well(tmp_path):
    """By a power of two, so that the weights are those without it, to the bit."""
    model, plain, sizes = bert(), bert(), []
    model.classifier.register_forward_hook(
        lambda module, args, logits: logits.register_hook(lambda g: sizes.append(g.abs().max().item())) and None
    )
    fitting = trainer(tmp_path, model, max_steps=2, ball=Layerwise(0.05))
    fitting.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    fit(fitting)
    trained(tmp_path, plain, max_steps=2, ball=Layerwise(0.05))
    assert equal_states(state(model), state(plain))
    assert len(sizes) == 4
    assert min(sizes) > 2**15


def test_dropout_is_drawn_for_the_climb_and_for_the_gradient(tmp_path):
    model, seen = bert(dropout=0.3), []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0].detach())))
    trained(tmp_path, model, max_steps=1, ball=Layerwise(1e-9), attack=ATTACK)
    assert [training for training, _ in seen] == [False] * ATTACK.steps + [True, True]
    assert (seen[-1][1] - seen[-2][1]).abs().max() > 0.1


def test_masked_positions_are_left_alone(tmp_path):
    """With an attack that adds 1 to every number, seen where words, positions and types are summed."""
    model, seen = bert(), []
    fitting = trainer(tmp_path, model, max_steps=1, ball=None, attack=lambda f, x: x + 1)
    batch = next(iter(torch.utils.data.DataLoader(Lines(), batch_size=4)))
    model.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(batch["input_ids"], batch["attention_mask"])
    fit(fitting)
    clean, attacked = seen
    assert torch.allclose(attacked - clean, batch["attention_mask"][..., None].expand_as(clean).double(), atol=1e-14)


def attacked(folder, model, attack, *batches):
    """u of each batch, where words, positions and types are summed."""
    fitting, seen = trainer(folder, model, ball=None, attack=attack), []
    hook = model.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    found = []
    for batch in batches:
        model(batch["input_ids"], batch["attention_mask"])
        clean = seen[-1]
        torch.manual_seed(3)
        fitting.training_step(model, batch, len(batch["labels"]))
        found.append(seen[-1] - clean)
    hook.remove()
    return found


@pytest.mark.parametrize("ball", [L2(0.5, box=None), Linf(0.5, box=None)])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_a_random_start_moves_does_not_depend_on_padding(tmp_path, ball, steps):
    """A text alone and with padding beside it: one u, of the whole radius, from the same draws."""
    ids = torch.tensor([[1 + byte for byte in b"Readability counts."]])
    texts = [F.pad(ids, (0, padding)) for padding in (0, 1, LENGTH - ids.shape[1])]
    batches = [{"input_ids": text, "attention_mask": (text > 0).long(), "labels": torch.tensor([1])} for text in texts]
    attack = PGD(ball, step_size=0.0 if steps == 1 else 0.2, steps=steps, start=uniform)
    alone, *padded = attacked(tmp_path, bert(), attack, *batches)
    largest = alone.norm() if isinstance(ball, L2) else alone.abs().max()
    assert 0.49 < largest <= 0.5 + 1e-12
    for u in padded:
        assert (u[:, : ids.shape[1]] - alone).abs().max() < 1e-8  # padding changes the network's rounding
        assert u[:, ids.shape[1] :].abs().max() == 0


@pytest.mark.parametrize("start", [uniform, gaussian(1.0)], ids=["uniform", "gaussian"])
def test_a_random_start_has_all_of_its_radius_in_each_text_of_a_batch(tmp_path, start):
    batch = next(iter(torch.utils.data.DataLoader(Lines(), batch_size=8)))
    (u,) = attacked(tmp_path, bert(), PGD(L2(0.5, box=None), 0.0, 1, start), batch)
    shares = u.square().sum((1, 2)).sqrt() / 0.5
    assert shares.min() > 0.98
    assert shares.max() <= 1 + 1e-12


def test_a_text_without_any_token_is_left_alone(tmp_path):
    ids = torch.ones(2, 5, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids * torch.tensor([[0], [1]]), "labels": torch.tensor([0, 1])}
    (u,) = attacked(tmp_path, bert(), PGD(L2(0.5, box=None), 0.1, 2), batch)
    assert not u[0].any()
    assert u[1].any()


@pytest.mark.parametrize(
    "attack", [ATTACK, FGSM(L2(0.5, box=None)), FGSM(Linf(0.01, box=None))], ids=["PGD", "FGM", "FGSM"]
)
def test_from_x_itself_the_attack_is_that_in_the_whole_ball_to_the_bit(tmp_path, attack):
    """Behind a lambda it is any attack, which knows nothing of padding."""
    one, other = bert(), bert()
    trained(tmp_path, one, max_steps=2, ball=Layerwise(0.05), attack=attack)
    trained(tmp_path, other, max_steps=2, ball=Layerwise(0.05), attack=lambda f, x: attack(f, x))
    assert equal_states(state(one), state(other))


class Pooled(torch.nn.Module):
    """The mean over all positions, so that a network sees what padding is embedded as."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(257, 32), torch.nn.Linear(32, 3)
        self.double()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, labels=None):
        return SequenceClassifierOutput(logits=self.head(self.embedding(input_ids).mean(1).tanh()))


def test_what_an_attack_asks_of_masked_positions_changes_nothing(tmp_path):
    padding, asked = next(iter(torch.utils.data.DataLoader(Lines(), batch_size=4)))["attention_mask"] == 0, []

    def attack(f, x):
        asked.append((f(x), f(x + padding[..., None]), f(x + 1)))
        return x

    trained(tmp_path, Pooled(), max_steps=1, ball=None, attack=attack)
    ((at_x, masked, everywhere),) = asked
    assert torch.equal(at_x, masked)
    assert not torch.equal(at_x, everywhere)


class Prepared(PerturbedTrainer):
    """Changes what comes out of the loader, as a subclass may."""

    change = staticmethod(lambda inputs: inputs)

    def _prepare_inputs(self, inputs):
        return self.change(super()._prepare_inputs(inputs))


def test_no_mask_is_a_mask_of_ones(tmp_path):
    def without(inputs):
        return {**inputs, "attention_mask": None}

    def missing(inputs):
        return {name: value for name, value in inputs.items() if name != "attention_mask"}

    def ones(inputs):
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    found = []
    for change in (without, missing, ones):
        kind = type("Changed", (Prepared,), {"change": staticmethod(change)})
        found.append(bert())
        trained(tmp_path, found[-1], max_steps=1, kind=kind, ball=None, attack=ATTACK)
    assert distance(found[0], found[1]) == 0
    assert distance(found[0], found[2]) < 1e-12


def test_a_box_of_pixels_is_refused_for_embeddings(tmp_path):
    """On a GPU nobody looks where inputs lie, and the box would move them by far more than eps."""
    with pytest.raises(ValueError, match=r"^attack: embeddings lie in no box, .* got \(0.0, 1.0\)$"):
        trained(tmp_path, bert(), max_steps=1, ball=None, attack=PGD(Linf(0.01), 0.01, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: {**inputs, "attention_mask": torch.zeros(4, 1, LENGTH, LENGTH)}, "attention_mask of shape"),
        (lambda inputs: {"labels": inputs["labels"], "inputs_embeds": torch.zeros(4, 3, 32)}, "input_ids of shape"),
        (lambda inputs: {**inputs, "input_ids": inputs["input_ids"][:, None]}, "input_ids of shape"),
    ],
    ids=["four dimensions", "no tokens", "choices"],
)
def test_batches_that_cannot_be_attacked_are_refused_in_one_line(tmp_path, change, message):
    kind = type("Changed", (Prepared,), {"change": staticmethod(change)})
    with pytest.raises(ValueError, match=rf"^attack: expected an? [^\n]*{message}[^\n]*$"):
        trained(tmp_path, bert(), kind=kind, max_steps=1, ball=None, attack=ATTACK)


def test_multiple_choice_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    data = [{"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": 0}] * 4
    with pytest.raises(
        ValueError, match=r"attack: expected a batch with input_ids of shape \(N, T\), got shape \(4, 2, 3\)"
    ):
        trained(tmp_path, BertForMultipleChoice(BertConfig(**sizes, vocab_size=9)), max_steps=1, ball=None,
                attack=ATTACK, train_dataset=data)  # fmt: skip


def test_embeddings_that_are_not_asked_are_noticed(tmp_path):
    class Other(Pooled):
        def get_input_embeddings(self):
            return self.unused

    model = Other()
    model.unused = torch.nn.Embedding(257, 32).double()
    with pytest.raises(ValueError, match=r"attack: .* its input embeddings were not asked"):
        trained(tmp_path, model, max_steps=1, ball=None, attack=ATTACK)


def test_a_batch_is_prepared_once(tmp_path):
    """Attack, climb and gradient see the same, also where preparing draws."""
    drawn, seen = [], []

    def change(inputs):
        drawn.append(torch.randint(1, 257, inputs["input_ids"].shape))
        return {**inputs, "input_ids": drawn[-1]}

    model = bert()
    model.register_forward_pre_hook(lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    fitting = trainer(
        tmp_path, model, max_steps=2, kind=type("Changed", (Prepared,), {"change": staticmethod(change)}),
        ball=Layerwise(0.05), attack=ATTACK,
    )  # fmt: skip
    fit(fitting)
    assert len(drawn) == 2
    assert len(seen) == 2 * (ATTACK.steps + 2)
    assert all(torch.equal(ids, drawn[i // (ATTACK.steps + 2)]) for i, ids in enumerate(seen))
    assert "_prepare_inputs" not in vars(fitting)


def poisoned(outputs, labels, num_items_in_batch=None):
    """NaN for every other batch of four."""
    return mean_loss(outputs, labels, num_items_in_batch) * (torch.nan if labels[0] == 1 else 1)


def normalised():
    """With statistics that a batch may spoil."""
    model = bert()
    model.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(32), model.classifier).double()
    return model


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("attack", [None, ATTACK], ids=["clean", "attacked"])
def test_a_micro_batch_that_is_not_finite_is_left_out_and_counted(tmp_path, micro_batches, attack):
    """Weights, momentum and statistics are those of the loop that never saw it."""
    model, expected = normalised(), normalised()
    fitting = trainer(
        tmp_path, model, micro_batches, ball=Layerwise(0.05), attack=attack, compute_loss_func=poisoned
    )  # fmt: skip
    fit(fitting)
    plain_loop(expected, micro_batches, ball=Layerwise(0.05), attack=attack, left_out=[1])
    assert fitting.dropped == 2 * micro_batches
    for name, tensor in state(expected).items():
        assert torch.allclose(state(model)[name], tensor, rtol=0, atol=0 if attack is None else 1e-14), name
    assert not equal_states(state(model), state(normalised()))


def test_with_a_scaler_the_step_is_left_out_and_the_scale_lowered(tmp_path):
    model, expected = normalised(), normalised()
    fitting = trainer(tmp_path, model, ball=Layerwise(0.05), compute_loss_func=poisoned)
    fitting.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    fit(fitting)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    batch = next(iter(torch.utils.data.DataLoader(Lines(), batch_size=4)))
    for _ in range(2):

        def loss():
            logits = expected(batch["input_ids"], batch["attention_mask"]).logits
            return F.cross_entropy(logits, batch["labels"], reduction="sum") / 4

        with perturbed(expected, loss, Layerwise(0.05)):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal_states(state(model), state(expected))
    assert fitting.dropped == 2
    assert scaler.get_scale() == 2.0**18


def test_the_last_ascent_can_be_looked_at(tmp_path):
    fitting = trainer(tmp_path, bert(), max_steps=2, ball=Layerwise(0.05), start_step=1)
    assert fitting.ascent is None
    fit(fitting)
    assert fitting.ascent.skipped == 0
    assert 0.5 < fitting.ascent.value < 2
    assert fitting.dropped == 0
    late = trainer(tmp_path, bert(), max_steps=1, ball=Layerwise(0.05), start_step=1)
    fit(late)
    assert late.ascent is None


def test_after_an_evaluation_the_climb_is_in_train_mode_again(tmp_path):
    model, modes = bert(dropout=0.3), []
    model.classifier.register_forward_pre_hook(
        lambda module, args: modes.append({m.training for m in model.modules()}) if torch.is_grad_enabled() else None
    )
    rows = [row for row, _ in zip(Lines(), range(4), strict=False)]
    fitting = trainer(
        tmp_path, model, max_steps=3, ball=Layerwise(0.05), eval_dataset=rows, compute_loss_func=None,
        arguments={"eval_strategy": "steps", "eval_steps": 1},
    )  # fmt: skip
    fit(fitting)
    assert modes == [{True}] * 6


def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    """Stopped before `start_step`, which counts optimiser steps of the whole training."""
    saved = {"save_strategy": "steps", "save_steps": 1}
    whole, resumed = bert(), bert()
    given = {"ball": Layerwise(0.05), "start_step": 2, "arguments": saved}
    trained(tmp_path, whole, **given)
    fitting = trainer(tmp_path, resumed, **given)
    with contextlib.redirect_stdout(io.StringIO()):
        fitting.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert equal_states(state(resumed), state(whole))


def test_tied_weights_are_perturbed_once_in_accumulated_micro_batches(tmp_path):
    """A small GPT-2, whose embedding is its head: against a loop of its own, to the bit."""

    def gpt2():
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=257, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2)
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
        return GPT2LMHeadModel(config).double()

    def language_loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=0, reduction="sum") / 300

    class Next(Lines):
        def __iter__(self):
            for row in super().__iter__():
                yield {**row, "labels": row["input_ids"]}

    model, expected = gpt2(), gpt2()
    assert expected.lm_head.weight is expected.transformer.wte.weight
    trained(
        tmp_path, model, 2, max_steps=2, ball=Layerwise(0.05), train_dataset=Next(), compute_loss_func=language_loss
    )  # fmt: skip
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    batches = iter(torch.utils.data.DataLoader(Next(), batch_size=4))
    for _ in range(2):
        for _ in range(2):
            batch = next(batches)

            def loss(batch=batch):
                found = expected(batch["input_ids"], attention_mask=batch["attention_mask"])
                return language_loss(found, batch["labels"])

            with perturbed(expected, loss, Layerwise(0.05)):
                loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal_states(state(model), state(expected))
    assert distance(model, gpt2()) > 1e-3


def test_label_smoothing_which_takes_the_labels_out_reaches_climb_and_gradient(tmp_path):
    model, expected = bert(), bert()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    batches = iter(torch.utils.data.DataLoader(Lines(), batch_size=4))
    for batch in (next(batches), next(batches)):

        def loss(batch=batch):
            logits = expected(batch["input_ids"], batch["attention_mask"]).logits
            return F.cross_entropy(logits, batch["labels"], label_smoothing=0.1)

        with perturbed(expected, loss, Layerwise(0.05)):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained(
        tmp_path, model, max_steps=2, ball=Layerwise(0.05), compute_loss_func=None,
        arguments={"label_smoothing_factor": 0.1},
    )  # fmt: skip
    assert distance(model, expected) < 1e-9  # the smoothed part is summed in fp32


@pytest.mark.parametrize("fails_at", ["climb", "gradient"])
def test_an_exception_gives_the_weights_back_and_takes_the_attack_away(tmp_path, fails_at):
    class Failing(PerturbedTrainer):
        calls = 0

        def compute_loss(self, model, *args, **given):
            self.calls += model.training
            if self.calls == ["climb", "gradient"].index(fails_at) + 1:
                raise KeyboardInterrupt
            return super().compute_loss(model, *args, **given)

    model = bert()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model, kind=Failing, ball=Layerwise(0.05), attack=ATTACK)
    assert equal_states(state(model), before)
    ids = torch.ones(1, 3, dtype=torch.int64)
    assert torch.equal(model.get_input_embeddings()(ids), model.get_input_embeddings().weight[ids])


def test_an_optimiser_that_moves_weights_when_training_begins_does_so_before_the_climb(tmp_path):
    """As optimisers without schedule do; inside the climb the move would be lost."""

    class Moving(torch.optim.SGD):
        moved = False

        @torch.no_grad()
        def train(self):
            if not self.moved:
                self.moved = True
                torch._foreach_add_([p for group in self.param_groups for p in group["params"]], 1.0)

    model = bert()
    fitting = trainer(tmp_path, model, max_steps=1, ball=Layerwise(0.05))
    fitting.optimizer = Moving(model.parameters(), lr=0.0)
    fit(fitting)
    assert all(torch.equal(p, q + 1) for p, q in zip(model.parameters(), bert().parameters(), strict=True))


def test_where_no_process_holds_the_whole_weights_it_refuses(tmp_path, monkeypatch):
    given = {"ball": Layerwise(0.01)}
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "distributed_type", property(lambda self, kind=kind: kind))
            with pytest.raises(ValueError, match=rf"args: expected one process, .* got {kind.value}"):
                trainer(tmp_path, bert(), **given)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
        with pytest.raises(ValueError, match=r"args: expected one process, .* n_gpu=2"):
            trainer(tmp_path, bert(), **given)
    with pytest.raises(ValueError, match="args: expected one process, "):
        trainer(tmp_path, bert(), arguments={"parallelism_config": ParallelismConfig()}, **given)


@pytest.mark.parametrize("how", ["arguments", "module", "part", "wrapper"])
def test_an_attack_on_a_compiled_model_is_refused(tmp_path, how):
    """A forward that was compiled without the hook would go on without it: the attack would do nothing."""
    model = bert()
    if how in ("module", "part"):
        (model if how == "module" else model.bert.encoder).compile(backend="eager")
    given = {"arguments": {"torch_compile": how == "arguments"}}
    model = torch.compile(model, backend="eager") if how == "wrapper" else model
    trainer(tmp_path, model, ball=Layerwise(0.01), **given)
    with pytest.raises(ValueError, match="attack: expected a model that embeds its tokens once, and is not compiled"):
        trainer(tmp_path, model, ball=None, attack=ATTACK, **given)


class Spoiled(PerturbedTrainer):
    """Two ranks: in step 0 the first micro-batch of rank 1 is not finite, in step 1 its second, which both average."""

    taken = -1

    def training_step(self, *args, **given):
        self.taken += 1
        return super().training_step(*args, **given)

    def compute_loss(self, *args, **given):
        bad = self.args.process_index == 1 and self.taken in (0, 3)
        return super().compute_loss(*args, **given) * (torch.nan if bad else 1)


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, but nobody meets there
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, steps = normalised(), []
    rows = [row for row, _ in zip(Lines(), range(64), strict=False)]
    fitting = trainer(
        folder, model, 2, max_steps=3, kind=Spoiled, ball=Layerwise(0.05), train_dataset=rows,
        arguments={"ddp_find_unused_parameters": False, "max_grad_norm": 1.0},
    )  # fmt: skip
    fitting.optimizer.register_step_post_hook(lambda *_: steps.append(state(model)))
    fit(fitting)
    torch.save((steps, fitting.dropped), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_stay_equal_where_one_has_a_micro_batch_that_is_not_finite(tmp_path):
    """Its own is left out while gradients are its own, and the step where they are averaged."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode == 0
    (one, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (first, second) == (1, 2)
    for a, b in zip(one, other, strict=True):
        assert all(tensor.isfinite().all() for tensor in [*a.values(), *b.values()])
        assert all(torch.equal(a[name], b[name]) for name, _ in normalised().named_parameters())
    assert len(one) == 3


def test_what_it_cannot_do_it_refuses(tmp_path):
    small = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    trainer(tmp_path, small, ball=Layerwise(0.01))
    with pytest.raises(ValueError, match="attack: expected a model that embeds its tokens once"):
        trainer(tmp_path, small, ball=None, attack=ATTACK)
    with pytest.raises(ValueError, match=r"attack: expected a model with get_input_embeddings\(\)"):
        trainer(tmp_path, torch.nn.Linear(2, 3), ball=None, attack=ATTACK)
    with pytest.raises(ValueError, match="start_step: expected an integer >= 0, got -1"):
        trainer(tmp_path, bert(), ball=None, start_step=-1)


def test_the_example_perturbs_what_it_says_and_trains():
    with contextlib.redirect_stdout(io.StringIO()):
        (some, share), (all_, _) = (hf_trainer.train(where, steps=52) for where in (hf_trainer.but_embeddings, default))
    held_out = hf_trainer.documentation()[0][::2]
    given = [torch.tensor([row[name] for row in held_out]) for name in ("input_ids", "attention_mask", "labels")]
    with torch.no_grad():
        known = some.eval()(*given[:2]).logits.argmax(1) == given[2]
    assert share == pytest.approx(known.double().mean().item(), abs=1.5 / len(held_out))  # sums of other batches round
    assert not equal_states(state(some), state(all_))
    names = {name for name, p in some.named_parameters() if hf_trainer.but_embeddings(name, p) != default(name, p)}
    assert names == {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
