"""SAM and ASAM against oracles that were written from their formulas alone."""

import pytest
import torch
from against_oracles import close, grads, weights
from networks import batch, convolutional
from oracles import neighbours as oracles

from saltflat.neighbours.sharpness_aware import asam, sam
from saltflat.objectives import ce
from saltflat.weights import default, trained


@pytest.mark.parametrize("where", [trained, default])
def test_sam_is_the_oracle_s(setting, where):
    model, x, y, losses = setting
    w = weights(model, where)
    v, g = oracles.sam(oracles.mean_of(losses), w, 0.5)
    model.zero_grad()
    with sam(model, lambda: ce(model(x), y).mean(), 0.5, where=where) as ascent:
        found = ascent.displacement
        ce(model(x), y).mean().backward()
    close(found, v, atol=1e-14)
    close({name: grad for name, grad in grads(model).items() if name in w}, g, atol=1e-14)


@pytest.mark.parametrize("offset", [0.0, 0.01, 1.0])
def test_asam_is_the_oracle_s(setting, offset):
    model, x, y, losses = setting
    with torch.no_grad():
        model[0].weight[0] = 0.0
    w = weights(model)
    v, g = oracles.asam(oracles.mean_of(losses), w, 0.5, offset)
    with asam(model, lambda: ce(model(x), y).mean(), 0.5, offset=offset) as ascent:
        found = ascent.displacement
        ce(model(x), y).mean().backward()
    close(found, v, atol=1e-14)
    close(grads(model), g, atol=1e-13)  # the zeroed filter's BatchNorm multiplies rounding
    assert found["0.weight"][0].any() == (offset > 0)


def test_asam_with_a_huge_offset_is_sam_with_a_radius_as_much_larger():
    model, (x, y) = convolutional().eval(), batch()
    loss = lambda: ce(model(x), y).mean()
    with sam(model, loss, 0.5) as ascent:
        v = ascent.displacement
    with asam(model, loss, 0.5e-9, offset=1e9) as ascent:
        for name, found in ascent.displacement.items():
            torch.testing.assert_close(found, v[name], rtol=1e-6, atol=1e-9)
