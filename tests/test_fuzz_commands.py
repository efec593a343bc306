"""Hundreds of generated bad arguments to every command: exit code 2, one line, no traceback, nothing written.

What is wrong is put in by the type of each argument, which is read off the commands themselves.
"""

import inspect
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from commands import QUICK, run
from test_fuzz_config import FIELDS, kind_of

from saltflat.lab.cli import main
from saltflat.lab.commands import making, measuring, studies

RUN, NOWHERE = "{run}", "nowhere"
ODD = "\x1b[2J</style><script>\u202e{{7*7}}"
COMMANDS: dict[str, tuple[Any, list[str]]] = {  # a command's function, and arguments with which it would do something
    "demo": (making.demo, ["--out", "new"]),
    "recipes": (making.recipes, []),
    "download": (making.download, ["cifar10", "--out", "new"]),
    "label": (making.label, [RUN, "images.npz", "--out", "new.npz"]),
    "evaluate": (measuring.evaluate, [RUN, "--attacks", "clean"]),
    "export": (measuring.export, [RUN, "--out", "new"]),
    "landscape": (measuring.landscape, [RUN, "--points", "3", "--out", "new.html"]),
    "flatness": (measuring.flatness, [RUN, "--measures", "norms", "--out", "new.html"]),
    "report": (measuring.report, [RUN, "--out", "new.html"]),
    "study gap": (studies.gap, ["--preset", "small", "--dry"]),
    "study process": (studies.process, [RUN, "--out", "new"]),
    "study compare": (studies.compare, ["at", "at-awp", "--out", "new"]),
    "study claims": (studies.claims, ["--out", "new"]),
}
OF_KIND = {
    "int": ["x", "", "1.5", "-1", "nan", "9" * 30, "0x10", "1e3", ODD],
    "float": ["lots", "", "nan", "inf", "1/0", "1/2/3", "-1", "1e999", ODD],
    "name": ["", "nothing-of-that-name", ODD, "8"],
    "bool": [],  # flags, which take no value
    "str": [],
    "path": [],
    "numbers": ["x", "nan", "1/0"],
}
SEVERAL = ("mean", "std", "set", "recipes", "checkpoints", "arms")  # or none
OF_NAME = {  # what a type does not say
    "checkpoint": ["", "first", "../../best", ODD, "x" * 300],
    "device": ["gpu", "cuda:99", "cuda:x", "meta", "cpu:-1", ODD],
    "weights": [NOWHERE, ".", "junk", "x" * 300],
    "data_path": [NOWHERE, "junk", ".", "x" * 300],
    "attacks": ["", "pgd", "pgd-0", "pgd-20x0", "clean+fgsm", "fgsm+fgsm", ODD],
    "measures": ["", "flat", ODD],
    "recipes": ["", "att", ODD],
    "arms": ["", "att", ODD],
    "points": ["2", "0", "4", "1000000001"],
    "out": ["junk/below"],
    "listing": [NOWHERE, "junk", "."],
    "checkpoints": ["first", "../../best"],
    "set": ["", "=", "a=b", "optimizer.epochs", "seed=1", "data.=1", "awp.gamma=[1", "attack.eps=*a"],
    "seeds": ["0"],
    "floor": ["101"],
}  # fmt: skip


def parameters(function: Any) -> dict[str, str]:
    """Options by name, and what kind of value each takes."""
    hints = typing.get_type_hints(inspect.unwrap(function))
    return {name: _kind(hint) for name, hint in hints.items() if name != "return"}


def _kind(hint: Any) -> str:
    """That of one value of it."""
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    alone = [each for each in typing.get_args(hint) if each is not type(None)]
    if typing.get_origin(hint) is not Literal and alone:
        hint = alone[0]
    return "path" if hint is Path else kind_of(hint)


def generated(command: str) -> list[list[str]]:
    function, well = COMMANDS[command]
    start = [*command.split(), *well]
    found = []
    if well[:1] == [RUN]:
        found += [[*command.split(), NOWHERE], [*command.split(), "x" * 300], [*command.split(), ODD]]
    for name, kind in parameters(function).items():
        option = f"--{name.replace('_', '-')}"
        if option in ("--run", "--runs", "--images", "--name") or (option, command) == ("--recipes", "study compare"):
            continue  # positional, or any name is one
        if kind != "bool" and name not in SEVERAL:
            found.append([*start, option])  # its value is missing
        if (command, name) != ("study gap", "out"):  # is not looked at where models are only listed
            found += [[*start, option, value] for value in (*OF_KIND[kind], *OF_NAME.get(name, ()))]
    return found


BY_HAND = {
    "demo": [["demo", "--out", "junk"], ["demo", "--seeds", "1001"]],
    "recipes": [["recipes", "--nothing-of-that-name"]],
    "download": [["download"], ["download", "cifar11"], ["download", ""], ["download", ODD],
                 ["download", "cifar10", "--out", "junk"]],
    "label": [["label"], ["label", RUN], ["label", RUN, NOWHERE, "--out", "new.npz"],
              ["label", RUN, "junk", "--out", "new.npz"], ["label", RUN, "images.npz", "--out", "new.txt"],
              ["label", RUN, "images.npz", "--out", "junk"]],
    "evaluate": [["evaluate"], ["evaluate", "junk"], ["evaluate", RUN, "--examples", "999999999"],
                 ["evaluate", RUN, "--norm", "L2"],
                 ["evaluate", RUN, "--mean", "0.5"], ["evaluate", RUN, "--key", "a"],
                 ["evaluate", RUN, "--data", "digits"],
                 ["evaluate", "junk", "--model", "resnet"], ["evaluate", "junk", "--model", "mlp", "--eps", "8/255"],
                 ["evaluate", "junk", "--model", "x:y", "--eps", "1/255", "--data", "digits"],
                 ["evaluate", "junk", "--model", "vgg19-bn", "--eps", "1/255", "--data", "digits"],
                 ["evaluate", "junk", "--model", "vgg19-bn", "--eps", "1/255", "--data", "npz", "--data-path", "junk"],
                 ["evaluate", "junk", "--model", "vgg19-bn", "--eps", "1/255", "--data", "svhn", "--data-path", "."],
                 ["evaluate", NOWHERE, "--model", "vgg19-bn", "--eps", "1/255", "--data", "digits"],
                 ["evaluate", RUN, "--weights", "junk", "--model", "vgg19-bn", "--eps", "1/255"],
                 ["evaluate", RUN, "--attacks", "clean", "clean"]],
    "export": [["export"], ["export", RUN], ["export", NOWHERE, "--out", "new"], ["export", RUN, "--out", "."],
               ["export", RUN, "--out", "junk"]],
    "landscape": [["landscape"], ["landscape", RUN, NOWHERE], ["landscape", RUN, "junk"],
                  ["landscape", RUN, "--dimensions", "2", "--directions", "2"], ["landscape", RUN, "--dimensions", "3"],
                  ["landscape", RUN, "--out", "."]],
    "flatness": [["flatness"], ["flatness", RUN, NOWHERE], ["flatness", RUN, "--probes", "5"],
                 ["flatness", RUN, "--out", "."], ["flatness", RUN, "--measures", "norms", "norms"]],
    "report": [["report"], ["report", "."], ["report", "junk"], ["report", RUN, "--out", "."],
               ["report", RUN, "--out", "junk/page.html"]],
    "study gap": [["study", "gap"], ["study", "gap", RUN], ["study", "gap", RUN, RUN],
                  ["study", "gap", RUN, "--preset", "small"], ["study", "gap", "--nothing-of-that-name"],
                  ["study", "gap", "--preset", "small", "--recipes", "at"], ["study", "gap", "--preset", "paper"],
                  ["study", "gap", "--preset", "small", "--data-path", NOWHERE],
                  ["study", "gap", "--listing", NOWHERE], ["study", "gap", "--listing", "junk"],
                  ["study", "gap", "--listing", "bomb.yaml"], ["study", "gap", RUN, NOWHERE]],
    "study process": [["study", "process"], ["study", "process", RUN, RUN]],
    "study compare": [["study", "compare"], ["study", "compare", "att"], ["study", "compare", "at", "at"],
                      ["study", "compare", "cifar10-at"], ["study", "compare", "at", "--attacks", "pgd"]],
    "study claims": [["study", "claims", "--preset", "cpu"], ["study", "claims", "--extra-path", NOWHERE],
                     ["study", "claims", "--preset", "cpu", "--arms", "rst", "--set", "data.path=junk"],
                     ["study", "claims", "--arms", "at", "--out", "junk"]],
    "study": [["study", "nothing"], ["study", ""], ["study", "gap", "compare"], ["study", "--out", "new"]],
    "no command": [["trian" + ODD], ["x" * 10**5]],  # what tyro would suggest instead takes it seconds
    "train --resume": [["train", "--resume"], ["train", "--resume", NOWHERE], ["train", "--resume", "junk"],
                       ["train", "--resume", "."], ["train", "--resume", ""], ["train", "--resume", "x" * 300],
                       ["train", "--resume", RUN, "--out", "new"], ["train", "--resume", RUN, "--seed", "1"],
                       ["train", "at", "--resume", RUN], ["train", f"--resume={NOWHERE}"],
                       ["train", "--resume", ODD]],
    "train, beside its fields": [
        ["train"], ["train", "att"], ["train", "at", "--awp.gama", "1"], ["train", "at", "--out"],
        ["train", "at", "--out", "junk"], ["train", "at", "--out", "junk/below"], ["train", "at", "--out", "."],
        ["train", "at", "--out", "x" * 300], ["train", "at", "--seed"],
        ["train", "cifar10-at", "--out", "new"], ["train", "at", "--data.name", "cifar10", "--data.path", NOWHERE],
        *(["train", "at", "--data.name", name, "--data.path", path, "--out", "new"]
          for name in ("cifar10", "cifar100", "svhn", "parquet", "folder", "tiny-imagenet", "npz")
          for path in ("junk", ".")),
        ["train", "rst", "--out", "new"], ["train", "rst", "--extra.path", "junk", "--out", "new"],
        ["train", "at", "--model.initial", "junk", "--out", "new"], ["train", "at", "--model.initial", "."],
        ["train", "at", "--model.mean", "0.5", "0.5", "--model.std", "1", "1", "--out", "new"],
        ["train", "at", "--model.width", "1000000000", "--out", "new"],
        ["train", "at", "--data.validation-examples", "1000000000", "--out", "new"],
        ["train", "at", "--threads", "1000000000", "--out", "new"],
        ["train", "at", "--device", "cuda:99", "--out", "new"], ["train", "at", "--device", ODD, "--out", "new"],
    ],
}  # fmt: skip


def of_fields() -> list[list[str]]:
    """Every field of the config, by name, with some of the values that it cannot hold, a fifth of all in turn."""
    found = []
    for place, (name, hint) in enumerate(FIELDS.items()):
        kind, option = kind_of(hint), f"--{name.replace('_', '-')}"
        if name == "recipe":
            continue  # is no option
        values = [*OF_KIND[kind][place % 5 :: 5], ""] if OF_KIND[kind] else []
        found += [["train", "at", "--out", "new", option, value] for value in dict.fromkeys(values)]
        if kind not in ("bool", "numbers"):
            found.append(["train", "at", "--out", "new", option])
    return found


CASES = {
    **{command: generated(command) + BY_HAND.get(command, []) for command in COMMANDS},
    "train": of_fields(),
    **{name: cases for name, cases in BY_HAND.items() if name not in COMMANDS},
}


def test_there_are_hundreds_of_them_none_twice_and_of_every_command():
    every = [tuple(case) for cases in CASES.values() for case in cases]
    assert len(set(every)) == len(every)
    assert len(every) > 800
    functions = {module.__dict__[name] for module in (making, measuring, studies) for name in vars(module)
                 if getattr(vars(module)[name], "__wrapped__", None) is not None
                 and vars(module)[name].__module__ == module.__name__}  # fmt: skip
    assert functions == {function for function, _ in COMMANDS.values()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "at"
    run("train", "at", *QUICK, "--optimizer.epochs", "1", "--out", folder)
    return folder


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A folder with files that are of no use."""
    (tmp_path / "junk").write_bytes(b"\x80\x04junk\x00\xff" * 20)
    (tmp_path / "images.npz").write_bytes(b"PK\x03\x04 no images")
    (tmp_path / "bomb.yaml").write_text("- &a [x]\n- [*a, *a]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(*folders: Path) -> dict[Path, tuple[int, int]]:
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for folder in folders
        for path in (folder, *folder.rglob("*"))
    }


@pytest.mark.parametrize("command", CASES)
def test_bad_arguments_are_one_line_and_exit_code_2_and_write_nothing(command, trained, scratch, capsys):
    before, wrong = listing(scratch, trained), []
    for case in CASES[command]:
        try:
            main([word.replace(RUN, str(trained)) for word in case])
            code: Any = "went well"
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = repr(error)
        printed = capsys.readouterr()
        (*_, line), out = (printed.err.splitlines() or [""]), printed.out
        fine = code == 2 and printed.err == f"{line}\n" and line.startswith("saltflat: ") and line.isprintable()
        if not fine or out or listing(scratch, trained) != before:
            wrong.append((case, code, printed.err[-500:], out[-200:], sorted(listing(scratch).keys() - before.keys())))
    assert wrong == []


@pytest.mark.parametrize(
    "case",
    [
        ["train", "at", "--awp.gamma", "nan"],
        ["study", "gap", "--listing", "bomb.yaml"],
        ["train", "--resume", "junk"],
        ["evaluate", "x" * 300],
        ["report", "nowhere", "--out", "junk"],
    ],
)
def test_and_so_they_are_in_a_process_of_their_own(case, scratch):
    before = listing(scratch)
    found = subprocess.run([sys.executable, "-m", "saltflat", *case], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("saltflat: ")
    assert found.stdout == ""
    assert listing(scratch) == before
