"""Pseudo-labels behind `saltflat label`: what a network takes unlabelled images for, as robust self-training asks for.

    y_i = argmax_k z_k(x_i),  in eval mode, at w

Source: Carmon, Raghunathan, Schmidt, Liang, Duchi, "Unlabeled Data Improves Adversarial Robustness", NeurIPS 2019,
arXiv 1905.13736: there the network is one of ordinary training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saltflat.data import to_float
from saltflat.data.image_arrays import channels_first, whole_arrays
from saltflat.lab.config import BadInput
from saltflat.lab.console import progress, say
from saltflat.lab.precision import exact
from saltflat.lab.record import check_folder, replacing
from saltflat.lab.subjects import Subject


def label(of: Subject, images: Path, out: Path, batch_size: int) -> None:
    """`out`: an npz with `image`, the images as (N, H, W, C), and `label`, their classes by the network."""
    if out.exists():
        raise BadInput(f"out: expected a file that does not exist, got {str(out)!r}")
    if out.suffix != ".npz":
        raise BadInput(f"out: expected a name that ends in .npz, got {str(out)!r}")
    check_folder("out", out.parent)
    try:
        (pixels,) = whole_arrays(images, [("image", "x")])
        x = channels_first(pixels, f"{images}: images")
    except (OSError, ValueError) as error:
        raise BadInput(f"images: {' '.join(str(error).split())}") from None
    shape = tuple(of.splits["train"][0].shape[1:])
    if tuple(x.shape[1:]) != shape:
        raise BadInput(f"images: expected shape {shape}, as the network was trained on, got {tuple(x.shape[1:])}")
    classes = _classes(of, x, batch_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, image=x.permute(0, 2, 3, 1).numpy(), label=classes.numpy())
    say(f"{out}: {len(x)} images, labels by {of.folder} ({of.checkpoint})")


@exact()
@torch.no_grad()
def _classes(of: Subject, x: Tensor, batch_size: int) -> Tensor:
    device, found = next(of.model.parameters()).device, []
    with progress() as bar:
        task = bar.add_task("labelling", total=len(x))
        for part in torch.split(x, batch_size):
            found.append(of.model(to_float(part.to(device))).argmax(1).cpu())
            bar.advance(task, len(part))
    return torch.cat(found)
