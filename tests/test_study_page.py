"""The study's page: safe whatever names say, complete without a network, and the same for the same table."""

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from run_folders import HOSTILE, Parsed, plain
from study_tables import grid, names

from saltflat.lab.report.markdown import as_markdown
from saltflat.lab.study.findings import findings
from saltflat.lab.study.page import write
from saltflat.lab.study.table import Measure, Model, Table, write_table
from saltflat.lab.study.tables import association_table

KINDS = {"sharp": "gap", "confounded": "loss", "noise": "noise", "width": "width"}


def page(table: Table, folder: Path) -> str:
    write(table, folder, resamples=50, permutations=50)
    return (folder / "gap.html").read_text(encoding="utf-8")


def hostile() -> Table:
    """Every text that a table can carry is hostile."""
    table = grid({"m": "gap"})
    odd = HOSTILE + "\ud800\x00"
    models = tuple(
        Model(
            name=f"{odd} {place}",
            cluster=f"{odd} {place}",
            method=odd,
            axes={odd: odd, "seed": place},
            targets=model.targets,
            controls=model.controls,
            measures={odd: model.measures["m"]},
            errors={odd: 0.1},
            again={odd: model.measures["m"]},
            note=odd,
        )
        for place, model in enumerate(table.models)
    )
    return Table(odd, (Measure(odd, odd, odd, 1),), models, 50.0, {odd: odd})


def test_the_result_comes_first_and_everything_is_there(tmp_path: Path) -> None:
    text = plain(Parsed(page(grid(KINDS, floor=50), tmp_path)).text)
    assert text.index("Flatness goes with a small robust generalisation gap") < text.index("What goes with the gap")
    for words in (
        "gap in robust loss",
        "partial τ given training robust loss",
        "given weight norm",
        "worst sign error",
        "without a method",
        "ICC",
        "explained by how far the model is trained",
        "at-0.05-500-0-epoch-1",
        "10 draws, gamma 0.5, PGD-20 for each, eval mode",
        "PGD-20, L-inf, eps 8/255",
        "undertrained: training robust accuracy below 50 %",
        "logarithmic axis",
        "95 % percentile intervals over 50 bootstrap resamples of runs",
        "Seed of all draws: 0",
        "Runs of one setting with different seeds count as independent",
        "by setting",
    ):
        assert words in text, words


def test_controls_have_neither_a_verdict_nor_a_sign_error() -> None:
    table = association_table(findings(grid({"m": "gap"}), resamples=50, permutations=50))
    assert [body.name for body in table.bodies] == ["m", "training robust loss", "weight norm"]
    columns = [f"{column.text} {column.unit}".strip() for column in table.columns]
    sign_error, verdict, by_setting = (
        columns.index(name) for name in ("worst sign error axis", "verdict", "95 % interval by setting")
    )
    for body in table.bodies:
        for target, row in enumerate(body.rows):
            judged = body.name == "m" and target < 2
            assert (row.cells[verdict].mean != "") == judged
            assert (row.cells[sign_error].mean != "–") == judged
            assert row.cells[by_setting].spread.startswith("[")


def test_markdown_has_the_interval_by_setting_and_says_what_its_rows_are() -> None:
    table = association_table(findings(grid({"m": "gap"}), resamples=50, permutations=50))
    heads = plain(as_markdown(table)).splitlines()[2]
    assert heads.startswith("| measure | target | τ-b (95 % interval by run) | 95 % interval (by setting) | p |")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    ordinary = Parsed(page(grid(KINDS, floor=50), tmp_path / "ordinary"))
    parsed = Parsed(page(hostile(), tmp_path / "hostile"))
    assert set(parsed.tags) <= set(ordinary.tags)
    assert not {"script", "img", "iframe", "object"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.text.count("<script>alert(1)</script>") > 20


def test_figures_of_hostile_names_are_sound_xml(tmp_path: Path) -> None:
    drawn = re.findall(r"<svg .*?</svg>", page(hostile(), tmp_path), flags=re.DOTALL)
    texts = ["".join(ElementTree.fromstring(svg).itertext()) for svg in drawn]
    assert len(texts) == 3
    assert all("<script>" in text for text in texts)


def test_the_page_asks_the_network_for_nothing_and_its_references_hold(tmp_path: Path) -> None:
    text = page(grid(names(12, ["gap", "noise"])), tmp_path)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text).replace("http-equiv", "")
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    attributes = Parsed(text).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value or "" for name, value in attributes if name.endswith("href")]
    assert all(value.startswith("#") or value == "data:," for value in targets)
    used = {value[1:] for value in targets if value.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)
    assert not [name for name, _ in attributes if name in ("src", "srcset", "action", "onload")]
    assert attributes.count(("role", "img")) == 14


def test_the_csv_has_all_of_every_model(tmp_path: Path) -> None:
    table = grid(KINDS)
    odd = replace(table.models[0], measures={"sharp": math.nan}, note='a "note", with commas\nand lines')
    page(replace(table, models=(odd, *table.models[1:])), tmp_path)
    with open(tmp_path / "gap.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48
    assert rows[0]["note"] == odd.note
    assert rows[0]["sharp"] == rows[0]["noise"] == ""
    for row, model in zip(rows[1:], table.models[1:], strict=True):
        assert row["model"] == model.name
        assert row["run"] == model.cluster
        assert row["method"] == row["objective"] == model.method
        assert float(row["gap_loss"]) == model.targets["gap_loss"]
        assert float(row["weight_norm"]) == model.controls["weight_norm"]
        assert float(row["sharp"]) == model.measures["sharp"]
        assert float(row["sharp (standard error)"]) == model.errors["sharp"]
        assert float(row["sharp (again)"]) == model.again["sharp"]


@pytest.mark.parametrize("number", [0, 1, 4])
def test_too_few_models_make_a_page_that_says_so(tmp_path: Path, number: int) -> None:
    table = grid(KINDS)
    text = Parsed(page(replace(table, models=table.models[:number]), tmp_path)).text
    assert "Nothing can be said" in text
    assert "There are too few runs for intervals." in text
    assert json.loads((tmp_path / "findings.json").read_text())["models"] == number


def test_foreign_checkpoints_need_no_hyper_parameters(tmp_path: Path) -> None:
    table = grid(KINDS)
    models = tuple(replace(model, axes={}, errors={}, again={}) for model in table.models)
    text = Parsed(page(replace(table, models=models), tmp_path)).text
    assert "hyper-parameters not on record" in text
    assert "not given: no two models differ in one hyper-parameter alone" in text


def test_an_equal_table_gives_equal_bytes_without_torch(tmp_path: Path) -> None:
    table = grid(KINDS, floor=50)
    page(table, tmp_path / "here")
    write_table(table, tmp_path / "table.json")
    program = (
        "import sys; from pathlib import Path; from saltflat.lab.study.page import write; "
        "from saltflat.lab.study.table import read_table; "
        "write(read_table(Path(sys.argv[1])), Path(sys.argv[2]), resamples=50, permutations=50); "
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "table.json"), str(tmp_path / "there")]
    subprocess.run(arguments, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}, cwd=tmp_path)
    for name in ("gap.html", "gap.csv", "findings.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["findings.json", "gap.csv", "gap.html"]
