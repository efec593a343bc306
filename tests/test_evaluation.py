import math

import pytest
import torch
from networks import equal_states, state
from torch import nn

from saltflat import FGSM, L2, PGD, Linf
from saltflat.data import Images, digits, stratified_subset, to_float
from saltflat.evaluation import carlini_wagner, interval, outcomes
from saltflat.models import mlp, small_resnet
from saltflat.objectives import ce


@pytest.fixture(scope="module")
def images():
    test = digits().test
    return test.subset(stratified_subset(test.labels, 90, 0))


def test_outcomes_do_not_depend_on_batches(images):
    model = mlp().double()
    attack = PGD(Linf(0.1), 0.025, 5)
    whole = outcomes(model, images, attack, seed=1)
    for size in (1, 7, 64):
        part = outcomes(model, images, attack, batch_size=size, seed=1)
        assert torch.equal(part.correct, whole.correct)
        assert torch.allclose(part.loss, whole.loss, rtol=1e-9)
    assert not torch.equal(outcomes(model, images, attack, seed=2).loss, whole.loss)


def test_clean_outcomes_are_plain_predictions(images):
    model = mlp()
    with torch.no_grad():
        logits = model(to_float(images.images))
    found = outcomes(model, images, None)
    assert torch.allclose(found.loss, ce(logits, images.labels))
    assert torch.equal(found.correct, logits.argmax(1) == images.labels)
    assert found.accuracy == (logits.argmax(1) == images.labels).double().mean().item()


def test_the_model_is_left_as_it_was(images):
    model = small_resnet(in_channels=1, widths=(4, 8, 16), stem_stride=1).train()
    model[-1].eval()
    before, modes = state(model), [module.training for module in model.modules()]
    outcomes(model, images, PGD(Linf(0.1), 0.05, 2))
    assert equal_states(state(model), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


class Linear(nn.Module):
    """Two classes, z_1 - z_0 = <a, x> + b: robust exactly where the margin exceeds eps ‖a‖_dual."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(12, dtype=torch.float64))

    def forward(self, x):
        z = x.flatten(1) @ self.a - self.a.sum() / 2
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize(("ball", "dual"), [(Linf(0.05, None), 1), (L2(0.2, None), 2)])
@pytest.mark.parametrize("inner", [None, carlini_wagner])
def test_robust_accuracy_of_a_linear_model_is_its_closed_form(ball, dual, inner):
    model = Linear()
    pixels = torch.randint(0, 256, (300, 3, 2, 2), dtype=torch.uint8)
    with torch.no_grad():
        z = model(to_float(pixels, torch.float64))[:, 1]
    labels = (z > 0).long()
    robust = z.abs() > ball.radius * model.a.detach().norm(p=dual)
    more = {} if inner is None else {"inner": inner}
    found = outcomes(model, Images(pixels, labels, 2, "linear"), PGD(ball, ball.radius / 4, 40), **more)
    assert 0.1 < robust.double().mean() < 0.9
    assert torch.equal(found.correct, robust)


def test_the_attack_climbs_on_what_it_is_given_and_the_model_answers(images):
    model, asked = small_resnet(in_channels=1), []

    def attack_on(network):
        asked.append(network.training)
        return lambda x: -network(x)  # so that it looks for what the model is surest of

    attack = PGD(Linf(0.1), 0.05, 3)
    easier, clean = outcomes(model, images, attack, attack_on=attack_on), outcomes(model, images, None)
    assert easier.mean_loss < clean.mean_loss < outcomes(model, images, attack).mean_loss
    assert asked == [False]
    assert model.training


def test_a_longer_attack_is_no_weaker_on_average(images):
    model = mlp()
    losses = [
        outcomes(model, images, attack).mean_loss for attack in (None, FGSM(Linf(0.1)), PGD(Linf(0.1), 0.025, 20))
    ]
    assert losses == sorted(losses)


def test_interval_is_wilson_s():
    low, high = interval(30, 100)
    for p in (low, high):  # its ends are where the score test just rejects
        assert abs(0.3 - p) / math.sqrt(p * (1 - p) / 100) == pytest.approx(1.959963984540054)
    assert interval(0, 10)[0] == 0
    assert interval(10, 10)[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="correct"):
        interval(3, 2)
