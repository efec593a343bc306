"""What `benchmarks/peers` has found, as Markdown: one part, or all.

features       what was read: a table each for training, evaluation, and measures of flatness
cost           what a step of training does, counted
correctness    what was run: perturbations, failures, confident networks, Hessians, directions, verdicts
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

OURS = "Saltflat"
TRAINING = (
    "objectives with code", "AWP", "ascent in several steps", "SAM and other neighbours", "mixed precision",
    "several devices", "going on after a stop", "best epoch chosen on",
)  # fmt: skip
EVALUATION = (
    "AutoAttack", "norms of it", "evaluation goes on after a stop", "warns where attacks cannot be trusted",
    "evaluation in half precision", "attacks beside it",
)  # fmt: skip
MEASURES = (
    "slices and planes of the loss", "attacks made afresh at every point", "average- and worst-case robust flatness",
    "Hessian: largest eigenvalues", "Hessian: trace, density", "other curvature: GGN, K-FAC, inverses",
)  # fmt: skip


def markdown(path: Path, part: str = "", root: str = "..") -> str:
    """The tables of a record.

    Args:
        path: a `peers.json`.
        part: "features", "cost" or "correctness"; "" for all three.
        root: the way from the page to the project's folder, for links to its own files.
    """
    if part not in ("", *PARTS):
        raise ValueError(f"part: expected {', '.join(PARTS)}, or nothing, got {part!r}")
    found = json.loads(path.read_text())
    return "\n\n".join(text for name in PARTS if part in ("", name) for text in PARTS[name](found, root))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A Markdown table, its columns after the first to the right if they are numbers.

    >>> print(table(["", "n"], [["a", "1"]], numbers=True))
    |  | n |
    | --- | ---: |
    | a | 1 |
    """
    marks = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, marks, *rows])


def _features(found: Record, root: str) -> list[str]:
    of = found["environment"]
    words = (
        f"Read at the commits below; every cell leads to where it stands. “—”: searched for and not there. Empty: not "
        f"looked at. What was run, ran on Python {of['python']}, torch {of['torch']} and NumPy {of['numpy']}."
    )
    parts = [f"**Who**: {words}", _who(found)]
    for name, rows in (("Training", TRAINING), ("Evaluation", EVALUATION), ("Measures of flatness", MEASURES)):
        parts += [f"**{name}**", _capabilities(found, rows, root)]
    return parts


def _who(found: Record) -> str:
    rows = []
    for name, of in found["peers"].items():
        commit, shown = of["commit"][:7], "this project"
        if name != OURS:
            at = f"https://github.com/{name}"
            commit, shown = f"[{commit}]({at}/tree/{of['commit']})", f"[{name}]({at})"
        rows.append([of["title"], shown, f"{commit}, {of['date']}", of["licence"], str(of["test files"])])
    return table(["", "repository", "commit", "licence", "test files"], rows)


def _capabilities(found: Record, rows: Sequence[str], root: str) -> str:
    facts = {(fact["peer"], fact["row"]): fact for fact in found["read"]}
    names = [peer for peer in found["peers"] if any((peer, row) in facts for row in rows)]
    head = ["", *(found["peers"][name]["title"] for name in names)]
    return table(head, [[row, *(_cell(facts.get((name, row)), root) for name in names)] for row in rows])


def _cell(fact: Record | None, root: str) -> str:
    """What it says, leading to where."""
    if fact is None:
        return ""
    link = fact["link"] if fact["link"].startswith("https://") else f"{root}/{fact['link']}"
    return f"[{fact['says']}]({link})"


def passes(counts: Mapping[str, float]) -> float:
    """Forwards, backwards to the maps, and gradients of kernels: each as many multiplications as a forward.

    >>> passes({"forwards": 2, "backwards": 2, "weight gradients": 1, "statistics": 5})
    5
    """
    return counts["forwards"] + counts["backwards"] + counts["weight gradients"]


def _cost(found: Record, root: str) -> list[str]:
    methods = list(dict.fromkeys(method for by_method in found["steps"].values() for method in by_method))
    ours = found["steps"][OURS]
    rows = []
    for method in methods:
        for peer in found["peers"]:
            by_method = found["steps"].get(peer, {})
            if method in by_method:
                counts = by_method[method]
                title = f"**{OURS}**" if peer == OURS else found["peers"][peer]["title"]
                numbers = [f"{counts[name]:g}" for name in ("forwards", "backwards", "weight gradients", "statistics")]
                beside = "" if peer == OURS else f"{passes(counts) / passes(ours[method]):.2f}"
                added = _added(by_method, method)
                rows.append([method, title, *numbers, f"{passes(counts):g}", beside, added])
    head = ["", "by", "forwards", "backwards", "of them, with weight gradients", "updates of BatchNorm's statistics"]
    head += ["passes", "of ours", "AWP adds"]
    words = (
        "counted at the convolutions of a small network, in batches, over whole steps, second networks and forwards "
        "for logging included; PGD or its like with 10 steps, one step of ascent in the weights. Passes: forwards, "
        "backwards and weight gradients, each of which multiplies about as often as a forward. “AWP adds”: in "
        "passes, to the same code without it."
    )
    return [f"**A step of training**: {words}", table(head, rows, numbers=True)]


def _added(by_method: Mapping[str, Mapping[str, float]], method: str) -> str:
    plain = method.removesuffix("-AWP")
    if plain == method or plain not in by_method:
        return ""
    return f"{passes(by_method[method]) / passes(by_method[plain]) - 1:.0%}"


def _correctness(found: Record, root: str) -> list[str]:
    sections = (_climbs, _confidence, _attempts, _curvature, _directions, _verdicts)
    return [text for section in sections for text in section(found, root)]


def _by_peer(found: Record, what: str) -> list[tuple[str, str, Any]]:
    """(peer, title and which, what was found)."""
    return [
        (peer, f"{about['title']}, `{which}`", each)
        for peer, about in found["peers"].items()
        for which, each in found[what].get(peer, {}).items()
    ]


def _climbs(found: Record, root: str) -> list[str]:
    rows = []
    for _, title, of in _by_peer(found, "climbs"):
        low, high = f"{of['smallest size']:.2f}", f"{of['largest size']:.2f}"
        what = f"{of['tensors']}, {of['one-dimensional'] or 'none'}"
        drift = f"{of['drift']:.0e}, {of['weights that drifted']:.0%}" if of["drift"] else "0"
        size = low if low == high else f"{low} to {high}"
        scale = "yes" if of["parallel to g"] else "no"
        cells = [what, size, scale, f"{of['error']:.0e}", str(of["statistics"]), drift, f"{of['not finite']:.0%}"]
        rows.append([title, *cells])
    head = ["", "tensors moved, of one dimension", "‖v_l‖ / (γ‖w_l‖)", "one multiple of g for all"]
    head += ["largest error against γ‖w_l‖ g_l / ‖g_l‖"]
    head += ["BatchNorm updates", "drift after 200 times, weights", "not finite after one NaN"]
    words = (
        "v on one batch of a network in train mode, fp32, γ = 0.005, against the closed form of the paper's single "
        "step; then put on and taken off 200 times without a step of the optimiser: the largest change of a weight, "
        "and how many of those moved have changed; then once with a NaN in one pixel: the share of weights that are "
        "not finite once v is taken off. Rounding of w + v alone is some 5e-06 here."
    )
    return [f"**Weight perturbations**: {words}", table(head, rows, numbers=True)]


def _confidence(found: Record, root: str) -> list[str]:
    rows = [[title, f"{of:.0%}"] for _, title, of in _by_peer(found, "confidence")]
    words = (
        "two steps of training of a network that is very sure (logits 10,000 times as large, so that probabilities "
        "underflow to 0 in fp32), without AWP: the share of weights that are not finite afterwards."
    )
    return [f"**Confident networks**: {words}", table(["", "not finite"], rows, numbers=True)]


def _attempts(found: Record, root: str) -> list[str]:
    rows = [
        [title, "`{}`".format(of.replace("`", "'")) if of != "runs" else of]
        for _, title, of in _by_peer(found, "attempts")
    ]
    words = f"as they come, with torch {found['environment']['torch']} and NumPy {found['environment']['numpy']}."
    return [f"**What fails today**: {words}", table(["", "outcome"], rows)]


def _curvature(found: Record, root: str) -> list[str]:
    rows = []
    for _, title, of in _by_peer(found, "curvature"):
        for name in ("trace", "trace with the full budget"):
            if name in of:
                trace = of[name]
                few, many = trace["fewest products"], trace["most products"]
                products = str(few) if few == many else f"{few} to {many}"
                errors = [f"{trace['median error']:.1%}", f"{trace['worst error']:.1%}", products]
                first = name == "trace"
                largest, density = (f"{of['largest eigenvalue']:.0e}", of.get("density", "")) if first else ("", "")
                how = title if first else f"{title}, all products"
                rows.append([how, largest, *errors, density])
    head = ["", "largest eigenvalue, error", "trace, median error", "worst of 20 seeds", "products", "density"]
    words = (
        "of the clean loss of a network of 267 weights, fp32, against the dense Hessian in float64; relative errors. "
        "PyHessian stops by itself, early by default; its second row may take as many products as the others."
    )
    return [f"**Hessians**: {words}", table(head, rows, numbers=True)]


def _directions(found: Record, root: str) -> list[str]:
    rows = [
        [title, f"{of['error']:.0e}", "yes" if of["biases and norm layers move"] else "no"]
        for _, title, of in _by_peer(found, "directions")
    ]
    head = ["", "largest error of a filter's norm", "biases and norm layers move"]
    words = "of convolutions and linear layers: is every filter of d as long as that of w? Relative errors."
    return [f"**Filter-normalised directions**: {words}", table(head, rows, numbers=True)]


def _verdicts(found: Record, root: str) -> list[str]:
    (ours,) = found["verdicts"][OURS].values()
    rows = []
    for _, title, of in _by_peer(found, "verdicts"):
        alike = sum(one == other for one, other in zip(of, ours, strict=True))
        rows.append([title, f"{of.count('1')} of {len(of)}", f"{alike} of {len(of)}"])
    words = (
        "the standard version, L∞, one seed, the same small network and images of digits; how many stay right, and on "
        "how many images the verdict is ours. More seeds, networks and norms: "
        f"[another record]({root}/records/2026-11-25_autoattack-compared/README.md)."
    )
    return [f"**AutoAttack**: {words}", table(["", "right", "as ours"], rows, numbers=True)]


PARTS: dict[str, Callable[[Record, str], list[str]]] = {
    "features": _features,
    "cost": _cost,
    "correctness": _correctness,
}
