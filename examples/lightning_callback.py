"""Adversarial training with AWP in Lightning, as a callback around a module that knows nothing of it.

python examples/lightning_callback.py
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from saltflat import AT, PGD, Layerwise, Linf
from saltflat.data import digits, to_float
from saltflat.evaluation import outcomes
from saltflat.integrations.lightning import DoublePerturbation, on_images
from saltflat.models import small_resnet


class Classifier(LightningModule):
    """A module as one has it: no line of it is about adversaries."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def train(epochs: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    data, network = digits().train, small_resnet(in_channels=1, widths=(8, 16, 32), stem_stride=1)
    loader = DataLoader(TensorDataset(to_float(data.images), data.labels), batch_size=100, shuffle=True)
    attack = on_images(AT(), PGD(Linf(0.15), step_size=0.0375, steps=10))  # saltflat: the input adversary
    adversaries = DoublePerturbation(Classifier.loss, Layerwise(0.01), attack=attack)  # saltflat: both
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=epochs, callbacks=[adversaries], accelerator="cpu", **quiet)
    trainer.fit(Classifier(network), loader)
    return network


if __name__ == "__main__":
    network, test = train().eval(), digits().test
    print(f"robust {outcomes(network, test, PGD(Linf(0.15), step_size=0.0375, steps=20)).accuracy:.1%}")
