"""How flat the loss is around the weights: slices of it, flatness, and curvature."""

from saltflat.landscape.average_case import average_case
from saltflat.landscape.density import Density, spectral_density
from saltflat.landscape.directions import adversarial_direction, random_direction
from saltflat.landscape.estimate import Estimate
from saltflat.landscape.extent import area, curvature_at_zero, half_width, widths
from saltflat.landscape.fisher import fisher_trace, squared_gradients
from saltflat.landscape.hessian import Operator, as_weights, hessian, reattacked_hessian
from saltflat.landscape.lanczos import Eigenvalues, top_eigenvalues
from saltflat.landscape.noise import adaptive_gaussian, gaussian, on_surface, within
from saltflat.landscape.norms import distance, log_norms, weight_norm
from saltflat.landscape.robust import afresh, continued, frozen, total
from saltflat.landscape.slices import along, over
from saltflat.landscape.tolerance import tolerated_noise
from saltflat.landscape.trace import layer_traces, trace
from saltflat.landscape.weight_curvature import WeightCurvature, weight_curvature
from saltflat.landscape.worst_case import Worst, keskar_sharpness, worst_case

__all__ = [
    "Density",
    "Eigenvalues",
    "Estimate",
    "Operator",
    "WeightCurvature",
    "Worst",
    "adaptive_gaussian",
    "adversarial_direction",
    "afresh",
    "along",
    "area",
    "as_weights",
    "average_case",
    "continued",
    "curvature_at_zero",
    "distance",
    "fisher_trace",
    "frozen",
    "gaussian",
    "half_width",
    "hessian",
    "keskar_sharpness",
    "layer_traces",
    "log_norms",
    "on_surface",
    "over",
    "random_direction",
    "reattacked_hessian",
    "spectral_density",
    "squared_gradients",
    "tolerated_noise",
    "top_eigenvalues",
    "total",
    "trace",
    "weight_curvature",
    "weight_norm",
    "widths",
    "within",
    "worst_case",
]
