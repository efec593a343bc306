"""Names of attacks, and the columns that they stand for."""

import re

import pytest

from saltflat import L2, Linf
from saltflat.evaluation import suite
from saltflat.lab.config import BadInput
from saltflat.lab.threat import SUITES, Threat, columns
from saltflat.objectives import ce, margin

THREAT = Threat("Linf", 8 / 255, 2 / 255)


def column(name, threat=THREAT):
    (found,) = columns([name], threat)
    return found.column


def test_names_are_the_columns_of_the_suite():
    ball = Linf(8 / 255)
    assert column("clean") == suite.Column("clean")
    assert column("fgsm") == suite.fgsm(ball)
    assert column("pgd-20") == suite.pgd(ball, 20, 2 / 255)
    assert column("pgd-100x10") == suite.pgd(ball, 100, 2 / 255, 10)
    assert column("cw-7") == suite.pgd(ball, 7, 2 / 255, loss=margin)
    assert column("apgd-ce") == suite.apgd_ce(ball)
    assert column("apgd-dlr") == suite.apgd_dlr(ball)
    assert column("apgd-t") == suite.apgd_t(ball)
    assert column("fab-t") == suite.fab_t(ball)
    assert column("square") == suite.square(ball)
    assert column("spsa") == suite.spsa(ball)
    assert column("standard") == suite.standard(ball)
    assert column("fast") == suite.fast(ball)


def test_the_suite_of_the_paper_is_that_of_the_library():
    found = tuple(found.column for found in columns(SUITES["paper"], THREAT))
    assert found == (suite.Column("clean"), *suite.paper(Linf(8 / 255)))


def test_a_chain_is_its_parts_one_after_the_other():
    parts = [suite.pgd(L2(0.5), 5, 0.125, loss=ce), suite.square(L2(0.5))]
    assert column("pgd-5+square", Threat("L2", 0.5, 0.125)) == suite.chained("pgd-5+square", parts)


def test_words_say_what_is_run():
    words = {found.column.name: found.words for found in columns(["pgd-20x3", "cw-5", "clean"], THREAT)}
    assert words["pgd-20x3"] == (
        "PGD-20, step 2/255, 3 uniform starts, every iterate counts, on cross-entropy; Linf, eps 8/255"
    )
    assert "uniform start, every iterate counts, on the margin" in words["cw-5"]
    assert words["clean"] == "no attack"


def test_no_two_different_attacks_are_told_in_the_same_words():
    names = ["clean", "fgsm", "pgd-1", "pgd-2", "pgd-2x2", "cw-2", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
    names += ["spsa", "standard", "fast", "pgd-2+square", "square+pgd-2"]
    threats = [THREAT, Threat("L2", 8 / 255, 2 / 255), Threat("Linf", 4 / 255, 2 / 255), Threat("Linf", 8 / 255, 0.1)]
    words = [found.words for threat in threats[:3] for found in columns(names, threat)]
    assert len(set(words)) == 3 * len(names) - 2  # clean is clean
    ascents = [columns(["pgd-2"], threat)[0].words for threat in (threats[0], threats[3])]
    assert len(set(ascents)) == 2


BAD = {
    "pgd": "attacks: expected clean, fgsm, pgd-K[xR]",
    "pgd-0": "got 'pgd-0'",
    "pgd-20x0": "got 'pgd-20x0'",
    "pgd-20x": "got 'pgd-20x'",
    "autoattack": "got 'autoattack'",
    "": "got ''",
    "clean+square": "got 'clean'",
    "square+": "got ''",
    "square+square": "attacks: expected different attacks in a chain, got 'square+square'",
    "fast+apgd-ce": "attacks: expected different attacks in a chain",
}


@pytest.mark.parametrize("name", BAD)
def test_other_names_are_refused_in_one_line(name):
    with pytest.raises(BadInput, match=re.escape(BAD[name])) as error:
        columns([name], THREAT)
    assert "\n" not in str(error.value)


def test_a_name_stands_once():
    with pytest.raises(BadInput, match="attacks: expected each once, got 'fgsm' again"):
        columns(["fgsm", "clean", "fgsm"], THREAT)


@pytest.mark.parametrize("name", ["fgsm", "pgd-5", "cw-5"])
def test_plain_ascents_refuse_l1_in_a_sentence(name):
    with pytest.raises(BadInput, match=f"attacks: {name}: .*L1"):
        columns([name], Threat("L1", 12.0, 3.0))
    assert column("standard", Threat("L1", 12.0, 3.0)).stages


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_a_radius_is_needed_for_any_attack(eps):
    with pytest.raises(BadInput, match="eps: expected a number > 0"):
        columns(["clean", "fgsm"], Threat("Linf", eps, 0.1))
    assert columns(["clean"], Threat("Linf", 0.0, 0.0))
