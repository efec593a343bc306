"""From outcomes to what others read: a RobustBench entry, a model card, and a folder for the Hugging Face hub.

    model_info   the fields of model_info/DATASET/NORM/NAME.json in RobustBench's repository
    model_card   Markdown behind a YAML header, as the hub shows it
    hub_folder   model.safetensors, config.json, README.md, outcomes/

Sources: RobustBench (Croce et al. 2021, arXiv 2010.09670), its files and its guide to adding a model; the names of
files and of header fields that the hub knows.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from saltflat.lab.checkpoints import save_weights
from saltflat.lab.config import BadInput, shown
from saltflat.lab.record import replacing, write_text
from saltflat.models import published

DATASETS = ("cifar10", "cifar100", "imagenet")
HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}


def percent(share: float) -> str:
    """A share as RobustBench writes accuracies; BadInput if it is none, as when it is in percent already.

    >>> percent(0.5617)
    '56.17'
    """
    if not 0 <= share <= 1:
        raise BadInput(f"accuracy: expected a share between 0 and 1, got {share:g}")
    return f"{100 * share:.2f}"


def model_info(
    *,
    dataset: str,
    norm: str,
    eps: float,
    architecture: str,
    clean: float,
    robust: float,
    suite: str,
    n: int,
    of: int,
    name: str = "",
    authors: str = "",
    link: str = "",
    venue: str = "",
    additional_data: bool = False,
    number_forward_passes: int = 1,
    reported: str = "",
    footnote: str = "",
    unreliable: bool = False,
) -> dict[str, Any]:
    """A RobustBench entry, to be kept under model_info/`dataset`/`norm`/.

    Args:
        dataset: cifar10, cifar100 or imagenet, the only ones it has.
        norm: Linf or L2, likewise.
        architecture: as RobustBench calls it: WideResNet-34-10, PreActResNet-18.
        eps: radius in pixel units, images in [0, 1].
        clean, robust: shares that are right, and right under attack, of `n` out of the `of` test images.
        suite: what `robust` was measured by. Only `standard` is AutoAttack, and fills `autoattack_acc`; another suite
            is told in the footnote.
        name, authors, link, venue: of the paper.
        additional_data: whether more than the training set was trained on.
        number_forward_passes: that the network takes for one answer.
        reported: the paper's own robust accuracy, in percent, as written there.
        footnote: put before what is said there of the evaluation.
        unreliable: whether the attacks are known not to tell the truth here (gradient masking, randomness).

    Raises BadInput for another data set or norm, and for accuracies and counts that cannot be.

    >>> info = model_info(dataset="cifar10", norm="Linf", eps=8 / 255, architecture="WideResNet-34-10", clean=0.8536,
    ...                   robust=0.5617, suite="standard", n=10000, of=10000)
    >>> info["eps"], info["clean_acc"], info["autoattack_acc"]
    ('8/255', '85.36', '56.17')
    """
    if dataset not in DATASETS:
        raise BadInput(f"dataset: RobustBench has {', '.join(DATASETS)}, got {dataset!r}")
    if norm not in ("Linf", "L2"):
        raise BadInput(f"norm: RobustBench has Linf and L2, got {norm!r}")
    if not 0 < eps < math.inf:
        raise BadInput(f"eps: expected a positive radius in pixel units, got {eps:g}")
    if not 0 <= robust <= clean <= 1:
        raise BadInput(f"robust: expected 0 <= robust <= clean <= 1, got {robust:g} and {clean:g}")
    if not 1 <= n <= of:
        raise BadInput(f"n: expected between 1 and {of} examples, got {n}")
    if number_forward_passes < 1:
        raise BadInput(f"number_forward_passes: expected at least 1, got {number_forward_passes}")
    notes = [footnote] if footnote else []
    if suite == "standard":
        version = importlib.metadata.version("saltflat")
        notes.append(f"AutoAttack's standard attacks as implemented in Saltflat {version}.")
    else:
        notes.append(f"Robust accuracy under {suite}, which is not AutoAttack: {percent(robust)}.")
    if n < of:
        notes.append(f"Measured on {n} of {of} test images.")
    info: dict[str, Any] = {
        "link": link,
        "name": name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": shown(eps),
        "clean_acc": percent(clean),
        "reported": reported,
    }
    if suite == "standard":
        info["autoattack_acc"] = percent(robust)
    return {**info, "footnote": " ".join(notes), "unreliable": unreliable}


def model_card(
    title: str,
    *,
    architecture: str,
    dataset: str,
    norm: str,
    eps: float,
    accuracies: Mapping[str, float],
    n: int,
    of: int,
    config: Mapping[str, Any],
    text: str = "",
    licence: str = "unknown",
) -> str:
    """A model card: a header that machines read, then what was measured, and how to load it.

    Args:
        title: of the page.
        architecture, dataset, norm, eps, n, of: as in `model_info`.
        accuracies: column's name (clean, pgd-20, standard) -> share of right answers.
        config: as in `hub_folder`; the card spells it out, so that readers need not trust a file's.
        text: Markdown, put below the title.
        licence: an identifier that the hub knows, such as mit. Whoever publishes must choose it: the default says that
            nobody has.

    >>> card = model_card("AT-AWP", architecture="PreActResNet-18", dataset="cifar10", norm="Linf", eps=8 / 255, n=500,
    ...                   of=10000, accuracies={"clean": 0.8165}, config={"name": "preact-resnet18"})
    >>> print(*card.splitlines()[-4:-1], sep="\\n")
    from saltflat.models import published
    <BLANKLINE>
    model = published.load("model.safetensors", name='preact-resnet18')
    """
    header: dict[str, Any] = {
        "license": licence,
        "library_name": "saltflat",
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "adversarial-training", "image-classification", norm, dataset],
        "metrics": ["accuracy"],
    }
    if dataset in HUB_DATASETS:
        header["datasets"] = [HUB_DATASETS[dataset]]
    arguments = ", ".join(f"{name}={value!r}" for name, value in config.items())
    rows = [f"| {name} | {percent(share)} |" for name, share in accuracies.items()]
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {title}", ""]
    if text:
        lines += [text.strip(), ""]
    lines += [
        f"{architecture}, {dataset}. Images in [0, 1]; normalisation belongs to the network. Threat model: {norm}, eps "
        f"{shown(eps)}, in pixel units.",
        "",
        f"Right answers on {n} of {of} test images, in percent:",
        "",
        "| attack | accuracy |",
        "| --- | ---: |",
        *rows,
        "",
        "What became of each example is in `outcomes/`, if that folder is here. Robust accuracies are upper bounds: a "
        "stronger attack may find more.",
        "",
        "```python",
        "from saltflat.models import published",
        "",
        f'model = published.load("model.safetensors", {arguments})',
        "```",
        "",
    ]
    return "\n".join(lines)


def hub_folder(
    folder: Path, model: nn.Module, x: Tensor, config: Mapping[str, Any], card: str, outcomes: Sequence[Path] = ()
) -> None:
    """Write a model for others to load; the whole folder, or nothing.

    Args:
        folder: a new or empty one.
        model: its state dict is what is written, in its dtypes.
        x: (N, ...) inputs in pixel units. What was written is loaded again, as readers will, and must give the model's
            logits for them: it would not with a normalisation that `config` forgets.
        config: keyword arguments of `saltflat.models.published.load`: name, num_classes, in_channels, mean, std.
        card: README.md, such as `model_card` makes.
        outcomes: files to lie beside the model in `outcomes/`.

    Raises BadInput if the folder holds something, if an outcome is no file or two have one name, if `config` does not
    give the model back, and if the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"out: expected a folder that is new or empty, got {str(folder)!r}")
    for path in outcomes:
        if not path.is_file():
            raise BadInput(f"outcomes: expected a file, got {str(path)!r}")
    if len({path.name for path in outcomes}) < len(outcomes):
        raise BadInput(f"outcomes: expected names that differ, got {', '.join(path.name for path in outcomes)}")
    place = folder.resolve()
    growing = place.with_name(f".{place.name}.new")
    try:
        shutil.rmtree(growing, ignore_errors=True)  # of one that was killed right here
        growing.mkdir(parents=True)
        save_weights(growing / "model.safetensors", model)
        write_text(growing / "config.json", json.dumps(dict(config), indent=1) + "\n")  # others' fields, without a seal
        _check_comes_back(growing / "model.safetensors", model, x, config)
        write_text(growing / "README.md", card)
        for path in outcomes:
            with replacing(growing / "outcomes" / path.name) as temporary:
                shutil.copyfile(path, temporary)
        growing.rename(place)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"out: cannot make {str(folder)!r}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(growing, ignore_errors=True)


def _check_comes_back(weights: Path, model: nn.Module, x: Tensor, config: Mapping[str, Any]) -> None:
    try:
        loaded = published.load(weights, **config)
    except ValueError as error:
        reason = str(error).removeprefix(f"{weights}: ")
        raise BadInput(f"config: expected the arguments that load the model, got {dict(config)}: {reason}") from None
    with torch.no_grad():
        # both on the CPU, where they round alike
        expected, found = (network(x.cpu().float()) for network in (_plain(model), _plain(loaded)))
    difference = float((found - expected).abs().max()) if found.shape == expected.shape else math.inf
    if not difference <= 1e-3 * max(1.0, float(expected.abs().max())):
        raise BadInput(
            f"config: expected the arguments that load the model, got {dict(config)}: its logits differ by "
            f"{difference:g} from the model's"
        )


def _plain(model: nn.Module) -> nn.Module:
    """A copy for one careful look."""
    return copy.deepcopy(model).cpu().float().eval()
