"""The network as training begins with it: drawn from the seed, or with the weights of a checkpoint, ours or of others.

A last layer that has another number of classes there stays as it was drawn, which is what fine-tuning wants; anything
else that does not fit is refused.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from saltflat.data import Images, Stored
from saltflat.lab import build, checkpoints, record
from saltflat.lab.config import BadInput, Train
from saltflat.models import published
from saltflat.models.state_dicts import read_state


def begun(config: Train, like: Images | Stored) -> nn.Module:
    """The network for such images, on the CPU. BadInput for a checkpoint that cannot be begun with."""
    model, path = build.network(config, like), config.model.initial
    if path is None:
        return model
    *_, last = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(f"{last}.")}
    try:
        read = {name: _fitting(name, tensor, head) for name, tensor in read_state(path).items()}
        if path.suffix == ".safetensors":
            checkpoints.whole_weights(path)  # ours are as they were written
        weights, inside = published.fitted(read, model)
        if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{path}: expected finite weights, got {bad[0]!r} with others")
        theirs = _of_run(path) if inside is None else (tuple(inside.mean), tuple(inside.std))
        if theirs not in (None, (config.model.mean, config.model.std)):
            raise ValueError(
                f"{path} normalises by model.mean {list(theirs[0])} and model.std {list(theirs[1])}; set them"
            )
    except (OSError, ValueError) as error:
        raise BadInput(f"model.initial: {' '.join(str(error).split())}") from None
    model.load_state_dict(weights)
    return model


def _fitting(name: str, tensor: Tensor, head: dict[str, Tensor]) -> Tensor:
    """The tensor that was read, or the drawn one of a last layer that tells other classes apart."""
    for own, drawn in head.items():
        if f".{name}".endswith(f".{own}") and tensor.shape != drawn.shape and tensor.shape[1:] == drawn.shape[1:]:
            return drawn
    return tensor


def _of_run(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of the run that a checkpoint stands in, which its weights do not hold; None if it stands in none."""
    folder = path.absolute().parent.parent
    if path.suffix != ".safetensors" or not (folder / "config.yaml").is_file():
        return None
    of = record.read_config(folder).model
    return of.mean, of.std
