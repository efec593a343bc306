"""The study of the paper's claims: its arms, what is made of its results, and that it goes on from those alone."""

import json
import re
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path

import claim_results
import numpy as np
import pytest
from claim_results import changed, everything, made_up
from commands import run
from scipy import stats

from saltflat.lab import record
from saltflat.lab.config import BadInput, checked
from saltflat.lab.report.statistics import Spread
from saltflat.lab.study import arms, claims_markdown, claims_page
from saltflat.lab.study.claims_results import (
    Group,
    drop,
    flatness,
    gap,
    grouped,
    pairs,
    read_results,
    rise,
    robust,
)
from saltflat.lab.study.claims_tables import by_question, differences_table, reached_table
from saltflat.lab.study.claims_words import headline, side, with_awp

AT, AT_AWP = arms.SMALL.arms[:2]


def groups(folder, results):
    claim_results.write(folder, results)
    return grouped(read_results(folder), claims_markdown.ORDER)


# Arms


def with_data(base):
    return base if base.data.name == "digits" else arms.changed(base, {"data.path": Path("archive")})


@pytest.mark.parametrize("name", arms.PRESETS)
def test_every_config_of_a_preset_is_one(name):
    preset = arms.PRESETS[name]
    for arm in preset.arms:
        checked(arms.config(with_data(preset.base), arm, 0, Path("extra.npz")))


@pytest.mark.parametrize("name", arms.PRESETS)
def test_an_arm_differs_from_what_it_is_held_against_in_what_its_changes_name(name):
    """And so its weights, images and order are the same at the start."""
    preset = arms.PRESETS[name]
    by_name = {arm.name: arm for arm in preset.arms}
    assert len(by_name) == len(preset.arms)
    for place, arm in enumerate(preset.arms):
        if not arm.against:
            continue
        other = by_name[arm.against]
        assert preset.arms.index(other) < place
        ours, theirs = (
            claim_results.record.deciding(asdict(arms.config(preset.base, each, 0, Path("x")))) for each in (arm, other)
        )
        apart = {key for key in flat(ours) if flat(ours)[key] != flat(theirs)[key]} - {"recipe"}
        assert apart, arm.name
        assert apart <= {*arm.changes, *other.changes}


def flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_what_an_arm_is_held_against_comes_with_it_and_rst_comes_with_images():
    of = arms.CPU
    assert [arm.name for arm in arms.chosen(of, ["at-awp-cosine"], None)] == ["at", "at-cosine", "at-awp-cosine"]
    everyone = {arm.name for arm in of.arms}
    assert everyone - {arm.name for arm in arms.chosen(of, [], None)} == {"rst", "rst-awp"}
    assert {arm.name for arm in arms.chosen(of, [], Path("x.npz"))} == everyone
    with pytest.raises(BadInput, match="extra_path: expected a file of further labelled images for rst, got none"):
        arms.chosen(of, ["rst"], None)
    with pytest.raises(BadInput, match="extra_path: none of these arms takes further images, expected none, got 'x'"):
        arms.chosen(arms.SMALL, [], Path("x"))
    with pytest.raises(BadInput, match=r"arms: expected any of at, .*, got 'tradez'"):
        arms.chosen(of, ["tradez"], None)


# Numbers


def test_quantities_are_what_the_results_say(tmp_path):
    (group,) = groups(tmp_path, [made_up(AT, 0, (0.31, 0.24), 0.52, flat=0.4)])
    (run,) = group.runs
    values = [quantity(run) for quantity in (gap, drop, robust("best"), robust("last"), flatness, rise)]
    assert values == pytest.approx([28.0, 7.0, 31.0, 24.0, 0.4, 0.4 * np.mean(np.square(claim_results.ALPHAS))])


def test_differences_are_paired_over_the_seeds_that_both_have(tmp_path):
    results = [made_up(AT, seed, (0.3, 0.2), 0.5 + 0.02 * seed) for seed in (0, 1, 2)]
    results += [made_up(AT_AWP, seed, (0.3, 0.25), 0.4 + 0.03 * seed) for seed in (1, 2, 3)]
    (pair,) = pairs(groups(tmp_path, results))
    assert pair.adds_awp
    assert dict(pair.difference(gap).by_seed) == pytest.approx({1: -14.0, 2: -13.0})


def test_a_pair_adds_awp_alone_or_it_is_not_one_of_the_claim(tmp_path):
    named = {pair.arm.arm for pair in with_awp(groups(tmp_path, everything()))}
    assert {"at-awp", "trades-awp", "mart-awp", "at-awp-l2", "at-awp-gamma-0.02", "at-awp-mlp"} <= named
    assert not named & {"at-robust-wp", "at-random-wp", "at-awp-a-2", "at-awp-k2-5", "at-cosine", "at-l1"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [((-3.0, -3.1, -2.9), -1), ((3.0, 3.1, 2.9), 1), ((-3.0, 1.0, 2.0), 0), ((-3.0, -3.1), 0), ((-3.0,), 0)],
)
def test_a_difference_counts_when_the_interval_of_three_seeds_leaves_out_0(values, expected):
    assert side(Spread(dict(enumerate(values)))) == expected


# Words, tables, pages


def test_the_headline_counts_what_the_intervals_say(tmp_path):
    results = [made_up(AT, seed, (0.30, 0.20 + 0.001 * seed), 0.5) for seed in range(3)]
    results += [made_up(AT_AWP, seed, (0.30, 0.25), 0.4) for seed in range(3)]
    first, smaller, falls, *_ = [sentence.claim for sentence in headline(groups(tmp_path, results))]
    assert first.startswith("Plain AT loses 9.9 ± 0.1 points")
    assert smaller == "Robust generalisation gap at the last epoch: of 1 comparison, AWP lowers it in 1."
    assert falls.endswith("from the best epoch to the last: of 1 comparison, AWP lowers it in 1.")


def test_a_result_against_the_claim_is_said_as_plainly(tmp_path):
    results = [made_up(AT, seed, (0.30, 0.28), 0.4 + 0.001 * seed) for seed in range(3)]
    results += [made_up(AT_AWP, seed, (0.30, 0.20), 0.5) for seed in range(3)]
    _, smaller, *_ = [sentence.claim for sentence in headline(groups(tmp_path, results))]
    assert smaller == "Robust generalisation gap at the last epoch: of 1 comparison, AWP raises it in 1."


def test_what_three_seeds_cannot_tell_is_said(tmp_path):
    results = [made_up(AT, seed, (0.30, 0.28), 0.4 + 0.1 * seed) for seed in range(3)]
    results += [made_up(AT_AWP, seed, (0.30, 0.28), 0.45) for seed in range(3)]
    _, smaller, *_ = [sentence.claim for sentence in headline(groups(tmp_path, results))]
    assert smaller.endswith("of 1 comparison, the difference is not told from chance in 1.")


def test_tables_hold_means_deviations_and_intervals(tmp_path):
    last = {"at": (0.2, 0.21, 0.19), "at-awp": (0.25, 0.27, 0.29)}
    results = [
        made_up(arm, seed, (0.3, value), 0.5) for arm in (AT, AT_AWP) for seed, value in enumerate(last[arm.name])
    ]
    found = groups(tmp_path, results)
    place = [column.text for column in reached_table(found).columns].index("pgd-20, last")
    cell = reached_table(found).bodies[1].rows[0].cells[place]
    values = [100 * value for value in last["at-awp"]]
    assert (cell.mean, cell.spread) == (
        f"{statistics.mean(values):.1f}", f"± {statistics.stdev(values):.1f}",
    )  # fmt: skip
    cell = differences_table(pairs(found)).bodies[0].rows[0].cells[place]
    apart = [100 * (ours - theirs) for ours, theirs in zip(last["at-awp"], last["at"], strict=True)]
    low, high = stats.t.interval(0.95, 2, np.mean(apart), stats.sem(apart))
    assert (cell.mean, cell.spread) == (f"+{np.mean(apart):.1f}", f"[+{low:.1f}, +{high:.1f}]")


def test_questions_show_what_their_arms_are_held_against(tmp_path):
    for _, shown, some in by_question(groups(tmp_path, everything())):
        assert {pair.against.arm for pair in some} <= {group.arm for group in shown}


def test_a_page_is_a_function_of_the_results_and_shows_all_of_them(tmp_path):
    found = groups(tmp_path, everything())
    page = claims_page.render(found, "Claims")
    assert page == claims_page.render(groups(tmp_path / "again", everything()), "Claims")
    for group in found:
        assert group.arm in page
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:,)""", page)
    assert page.count("<svg") == 1 + 4 + 1 + 3


def test_what_failed_is_told_of_and_leaves_the_rest_as_it_was(tmp_path):
    results = [made_up(AT, seed) for seed in (0, 1)] + [made_up(AT, 2, note="training failed: no numbers")]
    results += [made_up(AT_AWP, seed, note="training failed: no numbers") for seed in range(3)]
    found = groups(tmp_path, results)
    page = claims_page.render(found, "Claims")
    assert page.count("training failed: no numbers") == 4
    assert reached_table(found).bodies[0].rows[0].cells[0].mean == "2"


@pytest.mark.parametrize("failed", ["at", "at-awp"])
def test_an_arm_all_of_whose_runs_failed_leaves_a_page_and_is_counted(tmp_path, failed):
    results = [
        made_up(arm, seed, note="training failed: no numbers" if arm.name == failed else "")
        for arm in (AT, AT_AWP)
        for seed in range(3)
    ]
    found = groups(tmp_path / "results", results)
    assert claims_page.render(found, "Claims").count("training failed") == 3
    assert headline(found)[-1].claim.endswith("of 1 comparison, 1 could not be made.")
    assert claims_markdown.summary(tmp_path)
    assert claims_markdown.brief(tmp_path, "")


def test_what_is_missing_is_listed(tmp_path):
    whole, hole = made_up(AT, 0), made_up(AT_AWP, 1)
    hole["flatness"]["measures"][0]["value"] = None
    found = groups(tmp_path / "results", [whole, hole])
    assert claims_page.missing(found) == [
        "at, seed 1: not trained",
        "at-awp, seed 0: not trained",
        "at-awp, seed 1: no average case",
    ]
    assert claims_markdown.so_far(found).startswith("2 of 24 arms so far; not trained yet: trades, trades-awp")
    assert not claims_markdown.so_far(groups(tmp_path / "all", everything()))


def test_names_are_escaped(tmp_path):
    hostile = "<script>alert(1)</script>\"'&\u202e"
    results = [changed(made_up(AT, seed), arm=hostile, question=hostile) for seed in range(2)]
    folder = tmp_path / "results"
    folder.mkdir()
    for place, found in enumerate(results):
        record.write_json(folder / f"{place}.json", found)
    page = claims_page.render(grouped(read_results(folder), []), hostile)
    assert "<script" not in page
    assert "\u202e" not in page


def test_nothing_at_all_makes_a_page(tmp_path):
    tmp_path.joinpath("results").mkdir()
    assert "No comparison" in claims_page.render(grouped(read_results(tmp_path / "results"), []), "Claims")


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(BadInput, match=r"results: '.*x\.json' is no result of this study"):
        read_results(tmp_path)


def test_markdown_holds_every_figure_that_is_drawn(tmp_path):
    claim_results.write(tmp_path / "results", everything())
    text, figures = claims_markdown.summary(tmp_path), claims_markdown.figures(tmp_path)
    assert set(re.findall(r"\]\(([a-z0-9-]+)\.svg\)", text)) == set(figures)
    assert all(svg.startswith("<svg") for svg in figures.values())
    assert isinstance(claims_markdown.groups_of(tmp_path)[0], Group)


# The command


QUICK = ["study", "claims", "--arms", "at-awp", "--seeds", "2", "--workers", "2", "--set", "optimizer.epochs=2",
         "data.examples=100", "model.width=4"]  # fmt: skip


@pytest.mark.slow
def test_the_command_goes_on_from_results_alone_and_refuses_those_of_other_settings(tmp_path, capsys):
    out = tmp_path / "study"
    run(*QUICK, "--out", out)
    names = {f"{arm}-seed{seed}" for arm in ("at", "at-awp") for seed in range(2)}
    assert {path.stem for path in (out / "results").iterdir()} == names
    page = (out / "claims.html").read_text()
    shutil.rmtree(out / "runs")
    (out / "claims.html").unlink()
    run(*QUICK, "--out", out)
    assert not (out / "runs").exists()
    assert (out / "claims.html").read_text() == page
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*QUICK, "attack.steps=2", "--out", out)
    assert ended.value.code == 2
    words = r"saltflat: out: \S+ holds at(-awp)?, seed 0, of other settings \(see config\.attack\.steps\); .*\n"
    assert re.fullmatch(words, capsys.readouterr().err)
    result = json.loads((out / "results" / "at-seed0.json").read_text())
    assert result["config"]["optimizer"]["epochs"] == 2
    assert len(result["epochs"]) == 2
    assert [row["name"] for row in result["last"]["attacks"]["rows"]] == ["clean", "pgd-20", "fast"]
