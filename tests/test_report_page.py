"""The page: safe whatever names say, complete without a network, legible to those who cannot see it."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from run_folders import Parsed, hostile_runs, page, plain, synthetic_run, two_groups, with_plane

from saltflat.lab.report import write_report
from saltflat.lab.report.curves import CENTRED, GroupLandscape
from saltflat.lab.report.figures import landscape


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    ordinary = Parsed(page([synthetic_run(tmp_path / "ordinary" / "run")]))
    hostile = Parsed(page(hostile_runs(tmp_path / "hostile")))
    assert set(hostile.tags) <= set(ordinary.tags)
    assert not {"iframe", "object"} & set(hostile.tags)
    assert hostile.tags.count("script") == 5  # the data of curves, lines and planes, and the two scripts that show them
    assert all(
        value.startswith("data:image/png;base64,") for name, value in hostile.attributes if name == "src" and value
    )
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count("<script>alert(1)</script>") > 20


def test_figures_of_hostile_names_are_sound_xml(tmp_path: Path) -> None:
    drawn = re.findall(r"<svg .*?</svg>", page(hostile_runs(tmp_path)), flags=re.DOTALL)
    texts = ["".join(ElementTree.fromstring(svg).itertext()) for svg in drawn]
    assert len(texts) == 9  # accuracies at two checkpoints, learning curves, four quantities along lines, two planes
    assert all("<script>" in text for text in texts)


def test_names_are_not_formulas_and_any_alphabet_will_do(tmp_path: Path) -> None:
    text = page(
        [synthetic_run(tmp_path / str(i), recipe=name) for i, name in enumerate(("_$a_", "$\\frac{", "対抗 🧂"))]
    )
    assert "対抗 🧂 · g(0)" in text
    assert "_$a_ · g(0)" in text


def test_the_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    text = page([*two_groups(tmp_path, [20, 21, 22], [10, 11, 12]), with_plane(tmp_path / "plane")])
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text).replace("http-equiv", "")
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    for name, value in Parsed(text).attributes:
        assert name not in ("srcset", "action", "onload")
        assert name != "src" or str(value).startswith("data:image/png;base64,")
        if name.endswith("href"):
            assert value is not None
            assert value.startswith("#") or value == "data:,"


def test_ids_are_unique_and_every_reference_has_one(tmp_path: Path) -> None:
    text = page([*two_groups(tmp_path, [20, 21], [10, 11]), with_plane(tmp_path / "plane")])
    attributes = Parsed(text).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in attributes if name.endswith("href") and value and value.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    used |= {value for name, value in attributes if name in ("aria-describedby", "data-probe", "data-island") and value}
    assert used <= set(ids)


def test_figures_are_named_for_those_who_cannot_see_them(tmp_path: Path) -> None:
    attributes = Parsed(page(two_groups(tmp_path, [20], [10]))).attributes
    assert attributes.count(("role", "img")) == 8
    labels = [value for name, value in attributes if name == "aria-label" and value]
    assert any(label.startswith("Learning curves of at-awp, mean over seeds: at epoch 6") for label in labels)
    assert any(
        label.startswith("Centred: robust loss, g(α) − g(0) in nats, along directions in weight space (random, ")
        for label in labels
    )


def test_captions_state_the_measurement(tmp_path: Path) -> None:
    text = plain(Parsed(page(two_groups(tmp_path, [20, 20, 20], [10]))).text)
    for words in (
        "PGD-10, L-inf, eps 8/255, step 2/255, uniform start",
        "n = 1000 training and 2000 test images",
        "n = 500 test images, 11 values of α from −1.00 to 1.00",
        "at: 3 seeds × 4 directions; at-awp: 1 seed × 4 directions",
        "Direction: random, filter-normalised; attack: PGD-10, made afresh at each alpha; BatchNorm: eval mode",
        "g(0) = 1.400 ± 0.000",
        "Measured on device cpu",
    ):
        assert words in text


def test_a_page_is_whole_or_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = synthetic_run(tmp_path / "run", landscape=False)
    path = tmp_path / "deep" / "report.html"
    write_report([folder], path, title="One & only")
    before = path.read_bytes()
    assert b"<title>One &amp; only" in before

    def refuse(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report([folder], path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], path)


def test_equal_records_give_an_equal_page_without_torch(tmp_path: Path) -> None:
    folders = [*two_groups(tmp_path, [20, 21, 22], [10, 11, 12]), with_plane(tmp_path / "plane")]
    here = page(folders)
    there = tmp_path / "there.html"
    program = (
        "import sys; from pathlib import Path; from saltflat.lab.report import write_report; "
        "write_report([Path(p) for p in sys.argv[2:]], Path(sys.argv[1])); "
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    arguments = [sys.executable, "-c", program, str(there), *map(str, folders)]
    subprocess.run(arguments, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}, cwd=tmp_path)
    assert there.read_text(encoding="utf-8") == here


def test_a_figure_leaves_matplotlib_and_the_page_alone() -> None:
    before = dict(matplotlib.rcParams)
    alphas = np.linspace(-1, 1, 3)
    group = GroupLandscape("at", alphas, (np.array([[2.0, 1.0, 2.0]]),))
    svg = landscape([group], CENTRED, footnotes=["n = 1"], identity="one", description='"quoted" <words>').svg
    assert dict(matplotlib.rcParams) == before
    assert svg.startswith("<svg ")
    assert svg.endswith("</svg>")
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert "var(--series-1, #0a68a6)" in svg
    assert "font-family: var(--figure-font, sans-serif)" in svg
    assert ">at · g(0) = 1.000</text>" in svg
    with pytest.raises(ValueError, match="identity"):
        landscape([group], CENTRED, identity='"><b>', description="")
