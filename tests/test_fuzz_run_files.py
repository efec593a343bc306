"""Every file that a run writes, against damage of every kind: what was written, what was saved before it, or one line.

A reader is tried in a process of its own, so that the end of the interpreter, too, is an outcome.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import QUICK, run
from damaged import damages, in_child

from saltflat.lab import checkpoints, points, record, verdicts_file
from saltflat.lab.report import read_run

LONGEST = 5.0  # seconds for one reading


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "at"
    run("train", "at", *QUICK, "--out", folder)
    run("evaluate", folder, "--examples", "20", "--attacks", "clean", "fgsm")
    run("landscape", folder, "--points", "3", "--examples", "10", "--steps", "1")
    return folder


def config(folder: Path, _: Path) -> Any:
    fields = record.deciding(asdict(record.read_config(folder)))
    return json.loads(json.dumps(fields, default=str))


def metrics(folder: Path, _: Path) -> Any:
    return record.read_metrics(folder)


def finding(_: Path, path: Path) -> Any:
    return record.read_again(path)


def weights(_: Path, path: Path) -> Any:
    return {name: tensor.tolist() for name, tensor in checkpoints.whole_weights(path).items()}


def state(folder: Path, _: Path) -> Any:
    """Of the newest state that is whole; those that were set aside are put back."""
    at, told = folder / "checkpoints", list[str]()
    found = checkpoints.newest_whole(at, told.append)
    for aside in at.glob("damaged-*"):
        aside.rename(at / aside.name.removeprefix("damaged-"))
    assert found is not None
    assert all("\n" not in line for line in told)
    return [found[1]["epoch"], len(told)]


def verdicts(_: Path, path: Path) -> Any:
    labels = torch.from_numpy(np.load(path)["label"]) if LABELS is None else LABELS
    kept = verdicts_file.read(path, ["clean", "fgsm"], labels)
    parts = {name: [part.tolist() for part in vars(of).values()] for name, of in kept.done.verdicts.items()}
    return [parts, kept.done.column, kept.done.stage, kept.done.spent, kept.seconds]


def slices(_: Path, path: Path) -> Any:
    return {name: values.tolist() for name, values in points._read(path, 3, 10).items()}


LABELS: Any = None
READERS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "config": ("config.yaml", config),
    "environment": ("environment.json", finding),
    "evaluation": ("evaluation.json", finding),
    "metrics": ("metrics.jsonl", metrics),
    "weights": ("checkpoints/last.safetensors", weights),
    "best weights": ("checkpoints/best.safetensors", weights),
    "state": ("checkpoints/resume-*.pt", state),
    "outcome": ("outcomes/*.json", finding),
    "verdicts": ("outcomes/*.npz", verdicts),
    "landscape": ("landscapes/*.json", finding),
    "points": ("landscapes/*.npz", slices),
}


def fits(name: str, found: Any, written: Any) -> bool:
    """Whether it is what was written, or, where that is told, what was whole before."""
    if name == "metrics":  # cut at the end of a line: the state knows how many there were
        return bool(found == written[: len(found)])
    if name == "state":  # the one before, and a line about the newest
        return found == written or (found[1] == 1 and found[0] < written[0])
    return bool(found == written)


def outcomes(name: str, folder: Path, path: Path, read: Callable[[Path, Path], Any], number: int) -> list[str]:
    wrong, whole, written = [], path.read_bytes(), read(folder, path)
    for what, data in damages(whole, number, 0):
        path.write_bytes(data)
        began, line = time.perf_counter(), ""
        try:
            if not fits(name, found := read(folder, path), written):
                line = f"reads other data: {str(found)[:200]}"
        except ValueError as error:
            if "\n" in str(error) or not str(error):
                line = f"not one line: {error!r}"
        except BaseException as error:
            line = f"raises {type(error).__name__}: {error}"
        if time.perf_counter() - began > LONGEST:
            line = f"takes {time.perf_counter() - began:.0f} s {line}"
        if line:
            wrong.append(f"{what}: {line}")
    path.write_bytes(whole)
    return wrong


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_of_a_run_are_refused_in_one_line_or_read_as_they_were(name, trained, monkeypatch):
    pattern, read = READERS[name]
    path = max(trained.glob(pattern), key=lambda each: (len(each.name), each.name))
    if name == "verdicts":
        monkeypatch.setitem(globals(), "LABELS", torch.from_numpy(np.load(path)["label"]))
    assert in_child(lambda: outcomes(name, trained, path, read, 25)) == []


def test_the_report_of_a_run_with_any_damaged_file_is_a_page_or_one_line(trained):
    """What is damaged becomes a note."""

    def all_of_them() -> list[str]:
        wrong = []
        for path in sorted(path for path in trained.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml")):
            whole = path.read_bytes()
            for what, data in damages(whole, 4, 1):
                path.write_bytes(data)
                try:
                    read_run(trained)
                except ValueError as error:
                    if path.name != "config.yaml" or "\n" in str(error):
                        wrong.append(f"{path.name}, {what}: {error!r}")
                except BaseException as error:
                    wrong.append(f"{path.name}, {what}: raises {type(error).__name__}: {error}")
            path.write_bytes(whole)
        return wrong

    assert in_child(all_of_them) == []


DEEP = b"[" * 10**5
LONG = b"9" * 10**5


@pytest.mark.parametrize(
    "data", [DEEP, b'{"a":' * 10**5, b'{"a": ' + LONG + b"}", b'{"a": 1e999}', b"\xff\xfe\x00", b"null"]
)
def test_json_that_was_written_to_do_harm_is_refused_in_one_line(data, trained, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    if data != b'{"a": 1e999}':  # for Python that is a number
        with pytest.raises(ValueError) as caught:
            record.read_again(tmp_path / "a.json")
        assert "\n" not in str(caught.value)
    (tmp_path / "metrics.jsonl").write_bytes(data + b"\n")
    with pytest.raises(ValueError) as caught:
        record.read_metrics(tmp_path)
    assert "\n" not in str(caught.value)
