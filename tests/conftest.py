"""Every test starts from the same global seed, on one thread, so that what it draws does not depend on its
neighbours.
"""

import pytest
import torch
from networks import batch, convolutional
from oracles import neighbours as oracles


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(params=["eval", "train"])
def setting(request):
    """A network in each mode, a batch, and the losses of its examples as a function of a dict of weights."""
    torch.manual_seed(0)
    model = convolutional().train(request.param == "train")
    x, y = batch()
    return model, x, y, oracles.cross_entropies(model, x, y)
