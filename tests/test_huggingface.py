"""`PerturbedTrainer` against a plain loop: a small BERT on bytes of text, with weights and embedded inputs attacked."""

import contextlib
import copy
import io

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from networks import equal_states, state
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from examples import hf_trainer
from saltflat import L2, PGD, Box, Layerwise, perturbed
from saltflat.inputs import zero
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
        TrainingArguments(str(folder), **settings, **(arguments or {})),
        train_dataset=Lines(),
        compute_loss_func=mean_loss,
        optimizers=(optimizer, None),
        **given,
    )


def fit(fitting):
    with contextlib.redirect_stdout(io.StringIO()):
        fitting.train()


def trained(*args, **given):
    fit(trainer(*args, **given))


def plain_loop(model, micro_batches=1, max_steps=4, ball=None, attack=None, start_step=0, **climb):
    """What the Trainer should do, without it: `inputs_embeds` stand where it has `input_ids`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    batches = iter(torch.utils.data.DataLoader(Lines(), batch_size=4))
    for step in range(max_steps):
        for _ in range(micro_batches):
            batch = next(batches)
            ids, mask, y = batch["input_ids"], batch["attention_mask"], batch["labels"]

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
        optimizer.zero_grad()


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


def test_what_it_cannot_do_it_refuses(tmp_path):
    small = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    trainer(tmp_path, small, ball=Layerwise(0.01))
    with pytest.raises(ValueError, match="attack: expected a model that embeds its tokens once"):
        trainer(tmp_path, small, ball=None, attack=ATTACK)
    with pytest.raises(ValueError, match="start_step: expected an integer >= 0, got -1"):
        trainer(tmp_path, bert(), ball=None, start_step=-1)


def test_the_example_perturbs_what_it_says_and_trains():
    with contextlib.redirect_stdout(io.StringIO()):
        (some, share), (all_, _) = (hf_trainer.train(where, steps=52) for where in (hf_trainer.but_embeddings, default))
    assert 0 <= share <= 1
    assert not equal_states(state(some), state(all_))
    names = {name for name, p in some.named_parameters() if hf_trainer.but_embeddings(name, p) != default(name, p)}
    assert names == {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
