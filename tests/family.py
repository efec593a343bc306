"""AWP and all its neighbours as the lab's configs build them, for tests that look at every member of the family."""

from dataclasses import replace

import torch
from torch import nn

from saltflat import PGD, Linf
from saltflat.inputs import zero
from saltflat.lab import adversaries, build
from saltflat.lab.config import Attack, Awp, Objective, Train
from saltflat.lab.recipes import NEIGHBOURS

REPLAYS = 4
MEMBERS = {
    "awp": Train(awp=Awp(gamma=0.01)),
    **{name: Train(awp=awp) for name, awp in NEIGHBOURS.items()},
    "free-at": Train(attack=Attack(replays=REPLAYS)),
    "free-at-awp": Train(attack=Attack(replays=REPLAYS), awp=Awp(gamma=0.01)),
}
COSTS = {
    # forwards and gradients of the weights of one step of AT with PGD-10, in batches: a half counts as a half
    "at": (11, 1),
    "awp": (12, 2),
    "robust-wp": (21, 11),  # 10 + K + 1, with the published K = 10
    "random-wp": (11, 1),
    "m-rwp": (11, 1),
    "arwp": (11, 1),
    "wt-awp": (13, 3),
    "sam": (12, 2),
    "asam": (12, 2),
    "kaggle-awp": (12, 2),
    "fast-awp": (11, 1),
    "free-at": (4, 4),  # with four replays, each a step of its own
    "free-at-awp": (8, 8),
}
DRAWN = ("random-wp", "m-rwp", "arwp")
OBJECTIVES = {"natural": 0.0, "at": 0.0, "trades": 6.0, "mart": 5.0, "alp": 0.5}  # and their beta
ATTACK = PGD(Linf(8 / 255), 4 / 255, 2, start=zero)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def ball(name, t=0.5, **changes):
    return adversaries.ball(configured(name, **changes))(t)


def configured(name, **changes):
    """A member, with some fields of its weight adversary changed."""
    return replace(MEMBERS[name], awp=replace(MEMBERS[name].awp, **changes))


def taking(name, model, optimizer, memory, *, objective="at", attack=ATTACK, attack_mode="eval", seed=7, **changes):
    """(x, y) -> Step of that member."""
    config = configured(name, **changes)
    config = replace(config, attack=replace(config.attack, mode=attack_mode))
    config = replace(config, objective=Objective(objective, OBJECTIVES[objective]))
    step, generator = adversaries.step(config, memory), torch.Generator().manual_seed(seed)

    def take(x, y):
        return step(
            model, x, y, objective=build.losses(config), attack=attack, ball=adversaries.ball(config)(0.5),
            optimizer=optimizer, generator=generator,
        )  # fmt: skip

    return take


class Poisoned(nn.Module):
    """A network in a row that gives NaN for a batch with a bright corner: everywhere, or, finite itself, in the
    gradient of its first layer alone.
    """

    def __init__(self, layers, backward=False):
        super().__init__()
        self.layers, self.backward = layers, backward

    def forward(self, x):
        factor = torch.where((x[:, :, 0, 0] > 0.5).any(), torch.nan, 1.0).to(x.dtype)
        if not self.backward:
            return self.layers(x * factor)
        h = self.layers[0](x)
        if h.requires_grad:
            h.register_hook(lambda g: g * factor)
        return self.layers[1:](h)


def bits(tensors):
    """{name: bytes}: -0.0 is not 0.0, and NaN is itself."""
    return {name: t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for name, t in tensors.items()}


def everything(model, optimizer):
    """All tensors of a model's and an optimiser's state, by name."""
    kept = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        kept |= {f"optimizer.{i}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return kept
