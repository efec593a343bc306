"""The result in words, whichever way it falls.

The claim: models whose loss is flat in the weights have a small robust generalisation gap. It is judged by the gap in
loss; the gap in accuracy stands beside it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from saltflat.lab.report.notation import UNBROKEN, counted, decimal
from saltflat.lab.report.words import Sentence
from saltflat.lab.study.findings import LEAST, Association, Estimate, Finding, Findings, Verdict
from saltflat.lab.study.resampling import detectable
from saltflat.lab.study.table import GAP_ACCURACY, GAP_LOSS, NEGATIVE, TRAIN_LOSS, WEIGHT_NORM, Table

UNSAID = (Verdict.SAME, Verdict.TOO_FEW)
FEW = 40  # runs, below which only strong associations can be told from none
TARGET_WORDS = {
    GAP_LOSS: "gap in robust loss",
    GAP_ACCURACY: "gap in robust accuracy",
    NEGATIVE: "test robust accuracy",
}
VERDICT_WORDS = {
    Verdict.SUPPORTED: "supported",
    Verdict.EXPLAINED: "explained by how far the model is trained",
    Verdict.CONTRADICTED: "contradicted",
    Verdict.NONE: "no association",
    Verdict.SAME: "no difference among the models",
    Verdict.TOO_FEW: "too few models",
}


def headline(found: Findings) -> list[Sentence]:
    """The claim's fate, the measures by verdict, the confounder, and how much the study could have seen."""
    if _silent(found):
        return [*_nothing_said(found), _extent(found)]
    sentences = [_overall(found), *_by_verdict(found), _confounder(found), _extent(found)]
    return [sentence for sentence in sentences if sentence.claim or sentence.evidence]


def _silent(found: Findings) -> bool:
    return all(one.with_target(GAP_LOSS).verdict in UNSAID for one in found.measures)


def _nothing_said(found: Findings) -> list[Sentence]:
    few = found.runs < LEAST
    if few:
        models, runs = counted(found.models, "model"), counted(found.runs, "run")
        why = f"{models} out of {runs} {'is' if found.models == 1 else 'are'} too few"
    else:
        why = f"no measure has values of {LEAST} runs or more that differ"
    answer = Sentence(
        f"Nothing can be said of flatness and the robust generalisation gap: {why}.",
        f"At least {LEAST} runs that are trained well enough are needed, with a measure and a gap that differ among "
        f"them. The numbers that there are stand below.",
    )
    return [answer, *([] if few else _by_verdict(found))]


def _overall(found: Findings) -> Sentence:
    counts = {verdict: len(found.with_verdict(GAP_LOSS, verdict)) for verdict in Verdict}
    parts = [f"{count} {VERDICT_WORDS[verdict]}" for verdict, count in counts.items() if count]
    total = len(found.measures)
    return Sentence(_fate(counts, total), f"Judged by the gap in robust loss: {', '.join(parts)}. {_looks(total)}")


def _fate(counts: Mapping[Verdict, int], total: int) -> str:
    """One sentence on the claim, from how many measures there are of each verdict."""

    def by(verdict: Verdict) -> str:
        return "the one measure" if total == 1 else f"{counts[verdict]} of {total} measures"

    reverse = f" By {by(Verdict.CONTRADICTED)} it is the reverse." if counts[Verdict.CONTRADICTED] else ""
    if counts[Verdict.SUPPORTED]:
        return (
            f"Flatness goes with a small robust generalisation gap by {by(Verdict.SUPPORTED)}, beyond what the "
            f"training loss explains.{reverse}"
        )
    if counts[Verdict.EXPLAINED]:
        return (
            "Flatness goes with a small robust generalisation gap, but no measure says more about the gap than how far "
            f"the model is trained.{reverse}"
        )
    if reverse:
        return f"Flatness does not go with a small robust generalisation gap.{reverse}"
    measures = "the one measure" if total == 1 else f"any of {total} measures"
    return f"No association of flatness with the robust generalisation gap was found by {measures}."


def _looks(total: int) -> str:
    if total == 1:
        return "One measure was looked at."
    return (
        f"{total} measures were looked at: were none associated with the gap, about one interval of 95{UNBROKEN}% in "
        f"twenty would still leave out 0, which is {total / 20:.2g} of these."
    )


def _by_verdict(found: Findings) -> list[Sentence]:
    sentences = []
    for verdict, opening in (
        (Verdict.SUPPORTED, "The claim is supported by"),
        (Verdict.EXPLAINED, "Explained by how far the model is trained:"),
        (Verdict.CONTRADICTED, "The claim is contradicted by"),
        (Verdict.NONE, "No association with the gap:"),
        (Verdict.SAME, "No difference among the models in"),
        (Verdict.TOO_FEW, "Too few models for"),
    ):
        members = found.with_verdict(GAP_LOSS, verdict)
        if members:
            names = _listed([one.measure.name for one in members])
            sentences.append(Sentence(f"{opening} {names}.", _evidence(verdict, members)))
    return sentences


def _evidence(verdict: Verdict, members: Sequence[Finding]) -> str:
    if verdict in UNSAID:
        return ""
    strongest = members[0].with_target(GAP_LOSS)
    parts = [f"{'The strongest, ' if len(members) > 1 else ''}{members[0].measure.name}: {numbers(strongest)}."]
    if verdict is not Verdict.NONE:
        parts += [meaning(strongest.tau.value), _in_accuracy(verdict, members)]
    return " ".join(filter(None, [*parts, *_reservations(verdict, members), _worst_axes(verdict, members)]))


def _in_accuracy(verdict: Verdict, members: Sequence[Finding]) -> str:
    verdicts = [one.with_target(GAP_ACCURACY).verdict or Verdict.TOO_FEW for one in members]
    if len(members) == 1:
        return f"With the gap in robust accuracy: {VERDICT_WORDS[verdicts[0]]}."
    return f"The gap in robust accuracy gives the same verdict for {verdicts.count(verdict)} of {len(members)}."


def _reservations(verdict: Verdict, members: Sequence[Finding]) -> list[str]:
    """What else is to be known of measures with this verdict, each remark only where it holds for one of them."""
    remarks: dict[Verdict, list[tuple[str, Callable[[Finding], bool]]]] = {
        Verdict.SUPPORTED: [
            ("Given the weight norm, the interval holds 0 for", lambda one: not _kept(one, WEIGHT_NORM)),
            ("Along at least one hyper-parameter, the sign error is above that of a coin for", _turns),
            ("Without one of the methods nothing of it is left for", _rests_on_one_method),
            ("Other draws change the value as much as other models do for", lambda one: one.intraclass < 0.5),
            ("Not of the gap alone: test robust accuracy is associated too with", _with_the_negative_control),
        ],
        Verdict.EXPLAINED: [
            ("Given the training loss, it points the other way for", _turned),
        ],
        Verdict.CONTRADICTED: [
            ("Given the training loss, the interval holds 0 for", lambda one: not _turned(one)),
        ],
        Verdict.NONE: [
            ("Other draws change the value as much as other models do for", lambda one: one.intraclass < 0.5),
            ("Given the training loss, the interval is on the expected side for", lambda one: _kept(one, TRAIN_LOSS)),
            ("Given the training loss, the interval is on the other side for", _turned),
        ],
    }  # fmt: skip
    held = ((words, [one.measure.name for one in members if holds(one)]) for words, holds in remarks.get(verdict, []))
    return [f"{words} {_listed(names)}." for words, names in held if names]


def _kept(finding: Finding, control: str) -> bool:
    """Whether the partial tau with the gap in loss leaves out 0 on the expected side."""
    association = finding.with_target(GAP_LOSS)
    given = {TRAIN_LOSS: association.given_train_loss, WEIGHT_NORM: association.given_weight_norm}[control]
    return given.excludes_zero(finding.measure.sign)


def _turned(finding: Finding) -> bool:
    """Whether it leaves out 0 on the other side, given the training loss."""
    return finding.with_target(GAP_LOSS).given_train_loss.excludes_zero(-finding.measure.sign)


def _turns(finding: Finding) -> bool:
    return finding.with_target(GAP_LOSS).worst_sign_error > 0.5


def _worst_axes(verdict: Verdict, members: Sequence[Finding]) -> str:
    """Along which hyper-parameters supported measures turn, and how few pairs of models say so."""
    if verdict is not Verdict.SUPPORTED:
        return ""
    turned = [one.with_target(GAP_LOSS) for one in members if _turns(one)]
    pairs = {axis.name: axis.pairs for one in turned for axis in one.axes if axis.name == one.worst_axis}
    worst = [f"{name} ({counted(n, 'pair')} of models)" for name, n in pairs.items()]
    return f"Where that error is largest: {_listed(worst)}." if worst else ""


def _rests_on_one_method(finding: Finding) -> bool:
    return any(finding.measure.sign * tau <= 0 for tau in finding.with_target(GAP_LOSS).without_method.values())


def _with_the_negative_control(finding: Finding) -> bool:
    tau = finding.with_target(NEGATIVE).tau
    return tau.excludes_zero(1) or tau.excludes_zero(-1)


def _confounder(found: Findings) -> Sentence:
    loss, norm, *_ = (one.with_target(GAP_LOSS).tau for one in found.controls)
    if not math.isfinite(loss.low):
        return Sentence("")
    return Sentence(
        f"For comparison, training robust loss alone has τ{UNBROKEN}={UNBROKEN}{estimate(loss)} with the gap, and "
        f"weight norm alone {estimate(norm)}.",
        "The gap in loss is test minus training loss, so that a part of the first association is built in.",
    )


def _extent(found: Findings) -> Sentence:
    left_out = len(found.undertrained)
    seeds = f"{counted(found.seeds, 'seed')}, " if found.seeds else ""
    parts = [
        f"{counted(found.models, 'model')} from {counted(found.runs, 'run')}, {seeds}"
        f"{counted(len(found.methods), 'method')}."
    ]
    if left_out:
        these = "1 undertrained model is" if left_out == 1 else f"{left_out} undertrained models are"
        parts.append(
            f"{these} left out (training robust accuracy below {found.floor:g}{UNBROKEN}%), since what has not learned "
            f"is flat. {_with_them(found)}"
        )
    elif found.floor > 0:
        parts.append(f"No model is below {found.floor:g}{UNBROKEN}% training robust accuracy, so none is left out.")
    if 1 < found.runs < FEW:
        parts.append(
            f"{counted(found.runs, 'run')} are few: only |τ| of about {detectable(found.runs):.2f} and more would be "
            f"detected in 80{UNBROKEN}% of such studies."
        )
    if found.settings < found.runs and not _silent(found):
        parts.append(_by_setting(found))
    if found.incomplete:
        parts.append(f"{counted(len(found.incomplete), 'more model')} could not be measured.")
    missing = [one for one in found.measures if one.missing]
    if missing:
        counts = ", ".join(f"{one.measure.name} ({one.missing})" for one in missing)
        parts.append(f"Models without a finite value are left out, measure by measure: {counts}.")
    return Sentence("", " ".join(parts))


def _by_setting(found: Findings) -> str:
    """What the main intervals take for granted, and whether their signs hold without it."""
    if found.settings < LEAST:
        outcome = f"Intervals by setting need at least {LEAST}."
    else:
        outcome = _signs("By setting", "by run", found, lambda one: one.tau_by_setting)
    return (
        "Runs of one setting with different seeds count as independent, so that intervals and p are narrow for claims "
        f"about settings, of which there {'is' if found.settings == 1 else 'are'} {found.settings}. {outcome}"
    )


def _with_them(found: Findings) -> str:
    """Whether the undertrained models would have changed a sign or a verdict's first condition."""
    return _signs("With all models", "without", found, lambda one: one.with_undertrained)


def _signs(how: str, otherwise: str, found: Findings, other: Callable[[Association], Estimate]) -> str:
    """Of which measures another interval of tau, where there is one, leaves out 0 on another side than the main one."""

    def sides(interval: Estimate) -> tuple[bool, bool]:
        return interval.excludes_zero(-1), interval.excludes_zero(1)

    with_gap = {one.measure.name: one.with_target(GAP_LOSS) for one in found.measures}
    there = {name: one for name, one in with_gap.items() if math.isfinite(other(one).low)}
    changed = [name for name, one in there.items() if sides(one.tau) != sides(other(one))]
    if not changed:
        return f"{how}, every interval of τ with the gap in loss lies as {otherwise}: on one side of 0, or around it."
    return f"{how}, the interval of τ with the gap in loss comes to lie otherwise for {_listed(changed)}."


def numbers(association: Association) -> str:
    """tau, its partials and p of one association."""
    p = f", p{UNBROKEN}={UNBROKEN}{p_words(association.p)}" if math.isfinite(association.p) else ""
    return (
        f"τ{UNBROKEN}={UNBROKEN}{estimate(association.tau)}{p}; given training robust loss "
        f"{estimate(association.given_train_loss)}, given weight norm {estimate(association.given_weight_norm)}"
    )


def estimate(value: Estimate) -> str:
    """
    >>> estimate(Estimate(0.5, 0.25, 0.75)).replace(UNBROKEN, " "), estimate(Estimate())
    ('0.50 [0.25, 0.75]', '–')
    """
    if not math.isfinite(value.value):
        return decimal(None)
    return f"{decimal(value.value)}{UNBROKEN}{bracketed(value)}".rstrip(UNBROKEN)


def bracketed(value: Estimate) -> str:
    """The interval alone, empty if there is none."""
    if not math.isfinite(value.low):
        return ""
    return f"[{decimal(value.low)},{UNBROKEN}{decimal(value.high)}]"


def p_words(p: float) -> str:
    """
    >>> p_words(0.0004998), p_words(0.04)
    ('0.0005', '0.040')
    """
    return decimal(p, 4 if p < 0.01 else 3)


def meaning(tau: float) -> str:
    """What a tau says of two models.

    >>> meaning(0.5).replace(UNBROKEN, " ")
    'τ = 0.50 means that of 100 pairs of models about 75 are ordered alike by measure and gap.'
    """
    alike = round(50 * (1 + abs(tau)))
    order = "alike" if tau >= 0 else "oppositely"
    value = f"τ{UNBROKEN}={UNBROKEN}{decimal(tau)}"
    return f"{value} means that of 100 pairs of models about {alike} are ordered {order} by measure and gap."


def _listed(names: Sequence[str]) -> str:
    """
    >>> _listed(["a", "b", "c"]), _listed(["a, 1", "b", "c"])
    ('a, b and c', 'a, 1; b; and c')
    """
    if len(names) == 1:
        return names[0]
    if any("," in name for name in names):
        return f"{'; '.join(names[:-1])}; and {names[-1]}"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def left_out(table: Table, found: Findings) -> list[Sentence]:
    """What the main result does not rest on, and why."""
    remarks = {model.name: f": {model.note}" if model.note else "" for model in table.models}
    notes = [
        Sentence(name, f"no gap, training loss or weight norm on record{remarks[name]}") for name in found.incomplete
    ]
    notes += [
        Sentence(
            name, f"undertrained: training robust accuracy below {found.floor:g}{UNBROKEN}%, shown but not counted"
        )
        for name in found.undertrained
    ]
    notes += [
        Sentence(one.measure.name, f"no finite value for {counted(one.missing, 'model')}")
        for one in found.measures
        if one.missing
    ]
    bare = [model.name for model in table.models if not model.axes]
    if bare:
        notes.append(Sentence(_listed(bare), "hyper-parameters not on record: no part in Ψ and sign errors"))
    untested = all(math.isnan(one.with_target(GAP_LOSS).p) for one in found.measures)
    if found.measures and found.runs >= LEAST and untested:
        notes.append(Sentence("p", "not given: there are too few ways to exchange runs of equal size"))
    if found.measures and not any(one.with_target(GAP_LOSS).axes for one in found.measures):
        notes.append(Sentence("Ψ", "not given: no two models differ in one hyper-parameter alone"))
    return notes
