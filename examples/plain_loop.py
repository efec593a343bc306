"""Adversarial training with AWP in a loop of your own: what Saltflat adds to it is marked.

python examples/plain_loop.py
"""

import torch
from torch import nn

from saltflat import AT, PGD, Layerwise, Linf, perturbed
from saltflat.data import digits, to_float
from saltflat.evaluation import outcomes
from saltflat.models import small_resnet
from saltflat.random import seeded


def train(epochs: int = 2, batch_size: int = 100, seed: int = 0) -> nn.Module:
    """The same arithmetic, and the same random numbers, as `saltflat.train.fit`."""
    torch.manual_seed(seed)
    data, model = digits().train, small_resnet(in_channels=1, widths=(8, 16, 32), stem_stride=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    objective, attack = AT(), PGD(Linf(0.15), step_size=0.0375, steps=10)

    for epoch in range(1, epochs + 1):
        order, generator = torch.randperm(len(data), generator=seeded(seed, epoch, 0)), seeded(seed, epoch, 1)
        for rows in torch.split(order, batch_size):
            x, y = to_float(data.images[rows]), data.labels[rows]

            model.eval()
            x_adv = attack(objective.inner(model, x, y), x, generator=generator)  # saltflat: the input adversary
            model.train()

            def loss() -> torch.Tensor:
                return objective.outer(model, x, x_adv, y)  # noqa: B023  # called at once, below

            optimizer.zero_grad()
            with perturbed(model, loss, Layerwise(0.01)):  # saltflat: the weight adversary
                loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model


if __name__ == "__main__":
    network, test = train(), digits().test
    robust = outcomes(network, test, PGD(Linf(0.15), step_size=0.0375, steps=20))
    print(f"clean {outcomes(network, test, None).accuracy:.1%}, robust {robust.accuracy:.1%}")
