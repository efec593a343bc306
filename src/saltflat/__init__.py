"""Saltflat: training against adversarial inputs and adversarial weights, and measures of how flat the loss is.

The public names, each from the one file that it lives in. They are looked up when first used, so that a command line's
`--help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saltflat.averaging import ema as ema
    from saltflat.averaging import swa as swa
    from saltflat.balls import L1 as L1
    from saltflat.balls import L2 as L2
    from saltflat.balls import Box as Box
    from saltflat.balls import Ellipsoid as Ellipsoid
    from saltflat.balls import Filterwise as Filterwise
    from saltflat.balls import Global as Global
    from saltflat.balls import Layerwise as Layerwise
    from saltflat.balls import Linf as Linf
    from saltflat.inputs import FGSM as FGSM
    from saltflat.inputs import PGD as PGD
    from saltflat.objectives import AT as AT
    from saltflat.objectives import MART as MART
    from saltflat.objectives import TRADES as TRADES
    from saltflat.objectives import Natural as Natural
    from saltflat.random import PerExample as PerExample
    from saltflat.step import double_perturbation_step as double_perturbation_step
    from saltflat.step import in_mode as in_mode
    from saltflat.weights import displaced as displaced
    from saltflat.weights import gradient as gradient
    from saltflat.weights import perturbed as perturbed

__version__ = "0.1.0"

_HOMES = {
    "random": ["PerExample"],
    "balls": ["Linf", "L2", "L1", "Layerwise", "Global", "Ellipsoid", "Box", "Filterwise"],
    "objectives": ["Natural", "AT", "TRADES", "MART"],
    "inputs": ["FGSM", "PGD"],
    "weights": ["perturbed", "displaced", "gradient"],
    "averaging": ["ema", "swa"],
    "step": ["double_perturbation_step", "in_mode"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saltflat' has no attribute {name!r}")
    return getattr(import_module(f"saltflat.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
