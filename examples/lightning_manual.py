"""Adversarial training with AWP in Lightning, in the module's own training_step (manual optimisation).

python examples/lightning_manual.py
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from saltflat import AT, PGD, Layerwise, Linf, perturbed
from saltflat.data import digits, to_float
from saltflat.evaluation import outcomes
from saltflat.integrations.lightning import on_images
from saltflat.models import small_resnet
from saltflat.objectives import ce


class Classifier(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.automatic_optimization = network, False
        self.attacked = on_images(AT(), PGD(Linf(0.15), step_size=0.0375, steps=10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        x_adv, y = self.attacked(self, batch)  # saltflat: the input adversary
        optimizer.zero_grad()
        with perturbed(self, lambda: ce(self(x_adv), y).mean(), Layerwise(0.01)):  # saltflat: the weight adversary
            self.manual_backward(ce(self(x_adv), y).mean())
        optimizer.step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def train(epochs: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    data, network = digits().train, small_resnet(in_channels=1, widths=(8, 16, 32), stem_stride=1)
    loader = DataLoader(TensorDataset(to_float(data.images), data.labels), batch_size=100, shuffle=True)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=epochs, accelerator="cpu", **quiet).fit(Classifier(network), loader)
    return network


if __name__ == "__main__":
    network, test = train().eval(), digits().test
    print(f"robust {outcomes(network, test, PGD(Linf(0.15), step_size=0.0375, steps=20)).accuracy:.1%}")
