"""The threat model of an evaluation, and the columns of attacks against it, by the names that people type.

clean                                 no attack
fgsm, pgd-K, pgd-KxR, cw-K, cw-KxR    K steps, R restarts; cw climbs on the margin
apgd-ce, apgd-dlr, apgd-t, fab-t, square, spsa
standard, fast                        AutoAttack's standard version; APGD-CE and APGD-T alone
A+B                                   one column: whoever survives A meets B
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saltflat.balls import L1, L2, InputBall, Linf
from saltflat.evaluation import suite
from saltflat.evaluation.suite import Column
from saltflat.inputs import PGD
from saltflat.lab.config import Attack, BadInput, shown
from saltflat.objectives import ce, margin

BALLS: dict[str, Callable[[float], InputBall]] = {"Linf": Linf, "L2": L2, "L1": L1}
ALLOWED = "clean, fgsm, pgd-K[xR], cw-K[xR], apgd-ce, apgd-dlr, apgd-t, fab-t, square, spsa, standard, fast, or A+B"
ALONE: dict[str, tuple[Callable[[InputBall], Column], str]] = {
    "fgsm": (suite.fgsm, "FGSM"),
    "apgd-ce": (suite.apgd_ce, "APGD on cross-entropy, 100 steps"),
    "apgd-dlr": (suite.apgd_dlr, "APGD on the DLR loss, 100 steps"),
    "apgd-t": (suite.apgd_t, "APGD on the targeted DLR loss, 9 targets, 100 steps"),
    "fab-t": (suite.fab_t, "targeted FAB, 9 targets, 100 steps"),
    "square": (suite.square, "Square, 5000 queries"),
    "spsa": (suite.spsa, "SPSA, 100 steps of 256 samples"),
    "standard": (suite.standard, "AutoAttack standard: APGD-CE, APGD-T, FAB-T, Square"),
    "fast": (suite.fast, "APGD-CE, then APGD-T, as in AutoAttack"),
}
SUITES = {
    "standard": ("clean", "standard"),
    "fast": ("clean", "fast"),
    "paper": ("clean", "fgsm", "pgd-20", "pgd-100", "cw-100", "spsa", "standard"),
}


@dataclass(frozen=True)
class Threat:
    """What an attacker may do.

    norm: Linf, L2 or L1. eps: radius, in pixel units. step_size: of PGD and CW, in pixel units. BadInput for an eps
    in Linf that is larger than the box.
    """

    norm: str
    eps: float
    step_size: float

    def __post_init__(self) -> None:
        if self.norm == "Linf" and self.eps > 1:
            raise BadInput(f"eps: pixels lie in [0, 1], expected at most 1 (as in 8/255), got {self.eps:g}")

    @property
    def ball(self) -> InputBall:
        return BALLS[self.norm](self.eps)

    def pgd(self, steps: int) -> PGD:
        """From a uniform start."""
        return PGD(self.ball, self.step_size, steps)

    def pgd_in_words(self, steps: int) -> str:
        """What captions say of it.

        >>> Threat("Linf", 8 / 255, 2 / 255).pgd_in_words(20)
        'PGD-20, Linf, eps 8/255, step 2/255, uniform start'
        """
        return f"PGD-{steps}, {self}, step {shown(self.step_size)}, uniform start"

    def __str__(self) -> str:
        return f"{self.norm}, eps {shown(self.eps)}"


def trained_against(attack: Attack) -> Threat:
    """The threat model that a config's attack stands for. Steps of what measures it are at most a quarter of eps, also
    where training takes one long step.
    """
    return Threat(attack.norm, attack.eps, min(attack.step_size, attack.eps / 4))


@dataclass(frozen=True)
class Described:
    """A column, and what captions say of it."""

    column: Column
    words: str


def columns(names: Sequence[str], threat: Threat) -> list[Described]:
    """One for each name. BadInput, in one line, for names that stand for nothing or repeat, and for attacks that do not
    know the norm.

    >>> [found.words for found in columns(["clean", "apgd-ce+square"], Threat("L2", 0.5, 0.125))]
    ['no attack', 'APGD on cross-entropy, 100 steps, then Square, 5000 queries; L2, eps 0.5']
    """
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise BadInput(f"attacks: expected each once, got {repeated[0]!r} again")
    if threat.eps <= 0 and set(names) != {"clean"}:
        raise BadInput(f"eps: expected a number > 0, got {threat.eps:g}")
    return [_column(name, threat) for name in names]


def _column(name: str, threat: Threat) -> Described:
    if name == "clean":
        return Described(Column("clean"), "no attack")
    parts = [_part(word, threat) for word in name.split("+")]
    chain = suite.chained(name, [part.column for part in parts])
    if len({(stage.name, stage.rank) for stage in chain.stages}) < len(chain.stages):
        raise BadInput(f"attacks: expected different attacks in a chain, got {name!r}")
    return Described(chain, f"{', then '.join(part.words for part in parts)}; {threat}")


def _part(word: str, threat: Threat) -> Described:
    ascent = re.fullmatch(r"(pgd|cw)-([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,2}))?", word)
    if word not in ALONE and ascent is None:
        raise BadInput(f"attacks: expected {ALLOWED}, got {word!r}")
    try:
        if ascent is None:
            of, words = ALONE[word]
            return Described(of(threat.ball), words)
        kind, steps, restarts = ascent[1], int(ascent[2]), int(ascent[3] or 1)
        found = suite.pgd(threat.ball, steps, threat.step_size, restarts, ce if kind == "pgd" else margin)
    except ValueError as error:  # an attack that does not know the norm
        raise BadInput(f"attacks: {word}: {error}") from None
    on = "cross-entropy" if kind == "pgd" else "the margin max z_k - z_y (CW)"
    starts = "uniform start" if restarts == 1 else f"{restarts} uniform starts"
    words = f"PGD-{steps}, step {shown(threat.step_size)}, {starts}, every iterate counts, on {on}"
    return Described(found, words)
