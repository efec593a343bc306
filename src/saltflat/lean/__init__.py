"""Networks in eval mode that are cheaper to ask than the ones they stand for, up to rounding: what attacks climb on."""

from saltflat.lean.network import Lean as Lean
from saltflat.lean.network import lean as lean
from saltflat.lean.remembering import Leaner as Leaner
from saltflat.lean.remembering import leaner as leaner

__all__ = ["Lean", "Leaner", "lean", "leaner"]
