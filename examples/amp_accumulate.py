"""AWP with gradient accumulation and mixed precision: one v for the whole batch, a micro-batch in memory at a time.

python examples/amp_accumulate.py
"""

import torch
from torch import Tensor, nn

from saltflat import PGD, Layerwise, Linf, perturbed
from saltflat.balls import WeightBall
from saltflat.data import digits, to_float
from saltflat.evaluation import outcomes
from saltflat.models import small_resnet
from saltflat.objectives import ce
from saltflat.step import in_mode


def attacked(model: nn.Module, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler, dtype: torch.dtype) -> Tensor:
    """x_adv; the attack's gradients are those of the mean, and scaled, as in training: fp16 keeps them."""
    attack = PGD(Linf(0.15), step_size=0.0375, steps=10)
    with in_mode(model, "eval"), torch.autocast(x.device.type, dtype):
        return attack(lambda x_adv: scaler.scale(ce(model(x_adv), y) / len(x)), x)


def accumulated_step(
    model: nn.Module, x: Tensor, y: Tensor, parts: int, ball: WeightBall, optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """One step at w + v, where v climbs the mean loss of the whole batch; `dtype` is autocast's, or None for none."""

    def share(x: Tensor, y: Tensor) -> Tensor:  # a micro-batch's part of the mean; scaled, so that fp16 keeps gradients
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return scaler.scale(ce(model(x), y).sum() / total)

    total = len(x)
    shares = [lambda part=part: share(*part) for part in zip(x.chunk(parts), y.chunk(parts), strict=True)]
    optimizer.zero_grad()
    with perturbed(model, shares, ball):  # their sum is climbed; steepest(c g) = steepest(g), so v has no scale in it
        for loss in shares:
            loss().backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)  # at w; left out if a gradient overflowed, and v was 0 where the ascent's did
    scaler.update()


def train(epochs: int = 2, device: str = "cpu", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    data, model = digits().train, small_resnet(in_channels=1, widths=(8, 16, 32), stem_stride=1).to(device)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.amp.GradScaler(device)
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    for rows in [rows for _ in range(epochs) for rows in torch.split(torch.randperm(len(data)), 100)]:
        x, y = to_float(data.images[rows]).to(device), data.labels[rows].to(device)
        x_adv = attacked(model, x, y, scaler, dtype)
        accumulated_step(model.train(), x_adv, y, 2, Layerwise(0.01), optimizer, scaler, dtype)
    return model


if __name__ == "__main__":
    network, test = train(device="cuda" if torch.cuda.is_available() else "cpu"), digits().test
    print(f"robust {outcomes(network, test, PGD(Linf(0.15), step_size=0.0375, steps=20)).accuracy:.1%}")
