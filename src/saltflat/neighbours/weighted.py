"""WT-AWP, the weighted and truncated form of AWP, for networks on graphs.

    g = (1 - share) grad L(w) + share grad L(w + v)        weighted
    v_l = 0 for the last layer                             truncated

On graphs AWP needs a radius near 1, at which a network that is perturbed in every layer gives vanishing gradients; the
loss at w keeps them alive, and so does a last layer that is left alone. `share` is the paper's lambda. A step by these
gradients is

    with perturbed(model, loss, Layerwise(gamma), where=all_but_last(model)):
        (share * loss()).backward()
    ((1 - share) * loss()).backward()
    optimizer.step()

or `double_perturbation_step(..., where=all_but_last(model), share=share)`.

Source: Wu, Bojchevski, Huang, "Adversarial Weight Perturbation Improves Generalization in Graph Neural Networks", AAAI
2023, arXiv 2212.04983.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from saltflat.weights import Where, default


def all_but_last(model: nn.Module) -> Where:
    """The tensors that AWP perturbs, without those of the last layer: the module that owns the last of them, in the
    order of registration, which is the order of `named_parameters`; with its children, if it owns tensors itself, as
    attention on graphs does.

    Raises: ValueError for a model of one such layer: nothing would be left.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> where = all_but_last(model)
    >>> [name for name, parameter in model.named_parameters() if where(name, parameter)]
    ['0.weight']
    """
    every = dict(model.named_parameters(remove_duplicate=False))  # a last layer may be tied to the first
    owners = {name: name.rpartition(".")[0] for name, parameter in every.items() if default(name, parameter)}
    last = next(reversed(owners.values()), "")
    left = _outside(last, owners)
    while (parent := last.rpartition(".")[0]) in owners.values() and (further := _outside(parent, owners)):
        last, left = parent, further
    inside = {id(every[name]) for name in owners.keys() - left}
    if not left or all(id(every[name]) in inside for name in left):
        raise ValueError(f"model: expected at least two layers with weights, got {min(1, len(owners))}")
    return lambda name, parameter: default(name, parameter) and id(parameter) not in inside


def _outside(module: str, owners: Mapping[str, str]) -> set[str]:
    """The tensors that belong neither to the module nor to its children."""
    inside = f"{module}." if module else ""
    return {name for name, owner in owners.items() if owner != module and not f"{owner}.".startswith(inside)}
