"""The export behind `saltflat export`: a run's network and what was measured on it, for others to load and to compare.

model.safetensors  config.json  README.md  outcomes/    what the Hugging Face hub takes
model_info.json                                         a RobustBench entry, if AutoAttack was run on its terms
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saltflat.evaluation.suite import prepared
from saltflat.lab import export, record
from saltflat.lab.config import BadInput, Train
from saltflat.lab.console import say
from saltflat.lab.subjects import Subject, chosen, from_run
from saltflat.lab.threat import Threat

LOOKED_AT = 8  # images on which what was written must answer as the network does
ROBUSTBENCH = {"cifar10": "cifar10", "cifar100": "cifar100"}


@dataclass(frozen=True)
class Paper:
    """Where the network is described."""

    name: str = ""
    authors: str = ""
    link: str = ""
    venue: str = ""


def export_run(
    run: Path, checkpoint: str, out: Path, *, title: str, licence: str, paper: Paper, data_path: Path | None
) -> None:
    """Write the folder `out`; what the run's threat model was not evaluated on stays empty, and is said."""
    config, of = record.read_config(run), from_run(run, checkpoint, "cpu", None, data_path)
    arguments = _arguments(config, of)
    found = _evaluations(of)
    n = max((summary["n"] for _, summary in found), default=0)
    used = [(path, summary) for path, summary in found if summary["n"] == n]
    accuracies: dict[str, float] = {}
    for row in (row for _, summary in used for row in summary["attacks"]):  # of several attacks of a name the strongest
        accuracies[row["name"]] = min(row["accuracy"], accuracies.get(row["name"], 1.0))
    total = len(of.splits["test"][1])
    card = export.model_card(
        title or f"{config.recipe}, seed {config.seed}",
        architecture=arguments["name"],
        dataset=config.data.name,
        norm=of.threat.norm,
        eps=of.threat.eps,
        accuracies=accuracies,
        n=n,
        of=total,
        config=arguments,
        licence=licence,
    )
    x, _, _ = chosen(of, "test", 0)
    files = [path.with_suffix(suffix) for path, _ in used for suffix in (".npz", ".json")]
    info = _robustbench(config, of, arguments["name"], accuracies, n, total, paper, _unreliable(used))
    export.hub_folder(out, of.model, prepared(x[:LOOKED_AT], of.model), arguments, card, files)
    say(f"model, card and {len(used)} evaluations: {out}")
    if isinstance(info, str):
        say(f"no RobustBench entry: {info}")
    else:
        record.write_text(out / "model_info.json", json.dumps(info, indent=1) + "\n")
        say(f"RobustBench entry: {out / 'model_info.json'}")


def _arguments(config: Train, of: Subject) -> dict[str, Any]:
    """The keywords with which `models.published.load` makes this network."""
    model, x = config.model, of.splits["test"][0]
    names = {
        "preact-resnet18": "preact-resnet18",
        "vgg19-bn": "vgg19-bn",
        "wide-resnet": f"wide-resnet-{model.depth}-{model.widen_factor}",
        "small-cnn": f"small-cnn-{model.width or 32}",
        "small-resnet": f"small-resnet-{model.width or 24}",
    }
    if model.name not in names:
        raise BadInput(f"run: expected a network among {', '.join(names)} to export, got {model.name!r}")
    arguments: dict[str, Any] = {"name": names[model.name], "in_channels": x.shape[1]}
    if model.mean:
        arguments |= {"mean": list(model.mean), "std": list(model.std)}
    return arguments


def _evaluations(of: Subject) -> list[tuple[Path, dict[str, Any]]]:
    """Of these weights, on test images, under the threat that they were trained against."""
    found = [(path, record.read_again(path)) for path in sorted((of.folder / "outcomes").glob("*.json"))]
    return [
        (path, summary)
        for path, summary in found
        if summary.get("sha256") == of.sha256
        and summary.get("split") == "test"
        and summary.get("threat", {}).get("norm") == of.threat.norm
        and summary.get("threat", {}).get("eps") == of.threat.eps
    ]


def _unreliable(used: Sequence[tuple[Path, dict[str, Any]]]) -> bool:
    return any(summary.get("flags") for _, summary in used)


def _robustbench(
    config: Train,
    of: Subject,
    architecture: str,
    accuracies: dict[str, float],
    n: int,
    total: int,
    paper: Paper,
    unreliable: bool,
) -> dict[str, Any] | str:
    """The entry, or why there is none."""
    threat: Threat = of.threat
    if config.data.name not in ROBUSTBENCH:
        return f"it has no {config.data.name}"
    if "standard" not in accuracies or "clean" not in accuracies:
        return f"run first: saltflat evaluate {of.folder} --checkpoint {of.checkpoint} --suite standard"
    return export.model_info(
        dataset=ROBUSTBENCH[config.data.name],
        norm=threat.norm,
        eps=threat.eps,
        architecture=architecture,
        clean=accuracies["clean"],
        robust=accuracies["standard"],
        suite="standard",
        n=n,
        of=total,
        name=paper.name,
        authors=paper.authors,
        link=paper.link,
        venue=paper.venue,
        unreliable=unreliable,
    )
