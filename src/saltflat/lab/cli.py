"""The command line: `saltflat demo | recipes | download | train | label | evaluate | export | landscape | flatness |
report | study`; what each does stands in `commands`.

Bad input is one line on stderr and exit code 2, before anything was touched.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import dropwhile

import tyro

from saltflat import __version__
from saltflat.lab.commands import making, measuring, studies
from saltflat.lab.commands.frame import NAMED, Job, app, study_app
from saltflat.lab.config import BadInput, Interrupted, one_line, told
from saltflat.lab.recipes import RECIPES

KNOWN = (making, measuring, studies)  # a command is known once its file is imported, and in this order
SHARED = ("train", "evaluate", "landscape", "flatness")  # what many processes do together
HELP = frozenset({"--help", "-h"})
MARKERS = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.AvoidSubcommands, tyro.conf.CascadeSubcommandArgs)


def parsed(arguments: Sequence[str]) -> Job:
    """The job that the arguments ask for. Raises BadInput, or SystemExit(0) after `--help`."""
    complaint = io.StringIO()
    words = list(arguments) or ["--help"]
    if words == ["study"]:
        words += ["--help"]
    going_on = words[0] == "train" and any(word == "--resume" or word.startswith("--resume=") for word in words)
    if not going_on:
        _check_names(words)
    columns = os.environ.get("COLUMNS")
    try:
        if not HELP.intersection(words):
            os.environ["COLUMNS"] = "1000"  # tyro wraps what it complains of to the terminal
        with contextlib.redirect_stderr(complaint):
            if going_on:
                return tyro.cli(making.resume, args=words[1:], prog="saltflat train", config=MARKERS)
            return _asked_for(words)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BadInput(_one_line(complaint.getvalue())) from None
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _asked_for(words: list[str]) -> Job:
    """By a parser that knows no more than it must: of an option that it does not know, tyro looks for what else it may
    have been through all commands, 90 recipes among them, for seconds.
    """
    study = words[0] == "study"
    of, start = (study_app, "saltflat study") if study else (app, "saltflat")
    if not HELP.intersection(words):
        if words[0] == "train" and words[1:] and words[1] in RECIPES:
            so = making.train_by(words[1])
            return tyro.cli(so, args=words[2:], prog=f"saltflat train {words[1]}", config=MARKERS)
        of = NAMED.get(" ".join(words[: 1 + study]), of)
    job: Job = of.cli(args=words[study:], prog=start, config=MARKERS)
    return job


def _check_names(words: Sequence[str]) -> None:
    """BadInput for a command, a study or a recipe that nobody knows: tyro would take it for an option."""
    commands = dict.fromkeys(["train", *(name.split()[0] for name in NAMED)])  # train has a parser for each recipe
    _check_name("command", words[0], commands, f"expected one of {', '.join(commands)}")
    if words[0] == "study":
        studies = [name.split()[1] for name in NAMED if name.startswith("study ")]
        _check_name("study", words[1], studies, f"expected one of {', '.join(studies)}")
    if words[0] == "train":
        expected = "expected a name that `saltflat recipes` lists"
        if not words[1:]:
            raise BadInput(f"recipe: {expected}, got none")
        _check_name("recipe", words[1], RECIPES, expected)


def _check_name(what: str, name: str, known: Iterable[str], expected: str) -> None:
    """BadInput that names what it may have been. An option is none of them, and may stand before."""
    if name.startswith("-") or name in known:
        return
    near = difflib.get_close_matches(name[:100], known, 3)
    meant = f"; perhaps you meant {' or '.join(near)}" if near else ""
    raise BadInput(f"{what}: {expected}, got {told(name)}{meant}")


RULES = ("───", "---")


def _one_line(box: str) -> str:
    """What tyro drew in a box: the complaint itself, and the names that it suggests instead."""
    lines = [line.strip("│╭╰╮╯ ") for line in box.splitlines()][1:]  # the first is a title
    inside = list(dropwhile(lambda line: not line or line.startswith(RULES), lines))
    rule = next((i for i, line in enumerate(inside) if line.startswith(RULES)), len(inside))
    complaint = " ".join(inside[:rule]).replace("Error parsing --", "")
    complaint = re.sub(r"invalid literal for int\(\) with base 10:", "expected a whole number, got", complaint)
    rest = " ".join(line for line in inside[rule:] if not line.startswith((*RULES, "For full helptext", "in saltflat")))
    if "Available subcommands" in rest:
        return f"{complaint}; {rest[0].lower() + rest[1:]}"
    if "Perhaps you meant" in rest:
        meant = dict.fromkeys(re.findall(r"--[a-z][\w.-]*", rest))
        return f"{complaint}; perhaps you meant {' or '.join(meant)}"
    return complaint or "arguments that cannot be read"


def main(arguments: Sequence[str] | None = None) -> None:
    """What `saltflat` runs. Exit codes: 0 done, 2 bad input, 1 something failed while working, 75 told to stop by a
    signal and ready to go on, 130 interrupted.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if list(words) == ["--version"]:
        print(f"saltflat {__version__}")
        return
    try:
        _check_shared(words)
        parsed(words)()
    except BadInput as error:
        _complain(error)
        sys.exit(2)
    except Interrupted:
        sys.exit(75)  # EX_TEMPFAIL of sysexits.h: try again later
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (FloatingPointError, OSError) as error:
        _complain(error)
        # No file has such a name, whatever else was in the way: somebody gave it.
        sys.exit(2 if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _check_shared(words: Sequence[str]) -> None:
    """BadInput for a command that every process of torchrun would run for itself, and for processes without number."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise BadInput(f"{name}: expected a whole number, as torchrun sets it, got {os.environ[name]!r}")
    if os.environ.get("WORLD_SIZE", "1") != "1" and words and words[0] not in SHARED:
        raise BadInput(
            f"{words[0]}: torchrun's processes share {', '.join(SHARED)}; expected one process"
            f"{', with an --executor for its models' if words[0] in ('study', 'demo') else ''}"
        )


def _complain(error: Exception) -> None:
    """One line on stderr; of the processes that torchrun starts, by one where all have the same to say."""
    told_by_others = hasattr(error, "__notes__") or not isinstance(error, OSError)
    if not told_by_others or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"saltflat: {one_line(str(error))}", file=sys.stderr)


if __name__ == "__main__":
    main()
