"""Networks in eval mode that are cheaper to ask than the ones they stand for, up to rounding: what attacks climb on."""

from saltflat.lean.fused import leaner as leaner
from saltflat.lean.network import Lean as Lean
from saltflat.lean.network import lean as lean

__all__ = ["Lean", "lean", "leaner"]
