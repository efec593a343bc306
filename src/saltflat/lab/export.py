"""From outcomes to what others read: a RobustBench entry, a model card, and a folder for the Hugging Face hub.

    model_info   the fields of model_info/DATASET/NORM/NAME.json in RobustBench's repository
    model_card   Markdown behind a YAML header, as the hub shows it
    hub_folder   model.safetensors, config.json, README.md, outcomes/

Sources: RobustBench (Croce et al. 2021, arXiv 2010.09670), its files and its guide to adding a model; the layout that
`PyTorchModelHubMixin.from_pretrained` of huggingface_hub takes a local folder in.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import nn

from saltflat.lab.config import BadInput, shown
from saltflat.lab.record import replacing, write_json, write_text

HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}


def percent(share: float) -> str:
    """A share as RobustBench writes accuracies.

    >>> percent(0.5617)
    '56.17'
    """
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
        dataset, architecture: as RobustBench calls them: cifar10, WideResNet-34-10.
        norm: Linf or L2, the only ones it has.
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

    Raises BadInput for another norm, and for accuracies and counts that cannot be.

    >>> info = model_info(dataset="cifar10", norm="Linf", eps=8 / 255, architecture="WideResNet-34-10", clean=0.8536,
    ...                   robust=0.5617, suite="standard", n=10000, of=10000)
    >>> info["eps"], info["clean_acc"], info["autoattack_acc"]
    ('8/255', '85.36', '56.17')
    """
    if norm not in ("Linf", "L2"):
        raise BadInput(f"norm: RobustBench has Linf and L2, got {norm!r}")
    if not 0 <= robust <= clean <= 1:
        raise BadInput(f"robust: expected 0 <= robust <= clean <= 1, got {robust:g} and {clean:g}")
    if not 1 <= n <= of:
        raise BadInput(f"n: expected between 1 and {of} examples, got {n}")
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
        "What became of every example is in `outcomes/`, where that folder is. Robust accuracies are upper bounds: a "
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
    folder: Path, model: nn.Module, config: Mapping[str, Any], card: str, outcomes: Sequence[Path] = ()
) -> None:
    """Write a model for others to load; the whole folder, or nothing.

    Args:
        folder: a new or empty one.
        model: its state dict is what is written, in its dtypes.
        config: what the network is built from, as the keyword arguments of `saltflat.models.published.load` (name,
            num_classes, in_channels, mean, std); a class of one's own that mixes the hub's in gets it in `__init__`.
        card: README.md, such as `model_card` makes.
        outcomes: files to lie beside the model in `outcomes/`.

    Raises BadInput if the folder holds something, if an outcome is no file or two have one name, and if the folder
    cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"out: expected a folder that is new or empty, got {str(folder)!r}")
    for path in outcomes:
        if not path.is_file():
            raise BadInput(f"outcomes: expected a file, got {str(path)!r}")
    if len({path.name for path in outcomes}) < len(outcomes):
        raise BadInput(f"outcomes: expected names that differ, got {', '.join(path.name for path in outcomes)}")
    place = folder.absolute()
    growing = place.with_name(f".{place.name}.new")
    try:
        shutil.rmtree(growing, ignore_errors=True)  # of one that was killed right here
        growing.mkdir(parents=True)
        # cloned, since safetensors refuses tensors that share memory
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        with replacing(growing / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(growing / "config.json", dict(config))
        write_text(growing / "README.md", card)
        for path in outcomes:
            with replacing(growing / "outcomes" / path.name) as temporary:
                shutil.copyfile(path, temporary)
        growing.rename(place)
    except OSError as error:
        raise BadInput(f"out: cannot make {str(folder)!r}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(growing, ignore_errors=True)
