import torch
from torch import nn

from saltflat import Linf
from saltflat.evaluation import suite


def linear():
    model = nn.Linear(12, 3).double()
    x = torch.rand(40, 12, dtype=torch.float64)
    return model, x, model(x).argmax(1).detach()


def columns():
    return [suite.standard(Linf(0.1), steps=10, queries=30), suite.fgsm(Linf(0.1))]


def test_an_evaluation_that_goes_on_ends_with_the_same_verdicts():
    model, x, y = linear()
    *_, whole = suite.evaluate(model, x, y, columns(), batch_size=7)
    before = suite.evaluate(model, x, y, columns(), batch_size=7)
    for _ in range(9):
        reached = next(before)
    before.close()
    *_, last = suite.evaluate(model, x, y, columns(), batch_size=7, after=reached)
    assert 0 < whole.survivors < 40
    for name, of in whole.verdicts.items():
        assert torch.equal(of.by, last.verdicts[name].by)
        assert torch.equal(of.iteration, last.verdicts[name].iteration)
