"""How a function becomes a command: its arguments are parsed by its signature, and held to what their types say.

Parsing and doing are apart: a command only says what to do, as a function without arguments, so that bad input is one
line before anything was touched. torch is imported when the doing begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import tyro
from pydantic import Field

from saltflat.lab.config import BadInput, Count, refusal

Job = Callable[[], None]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
RunOrCheckpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT")]
Runs = Annotated[tuple[Path, ...], Field(min_length=1), tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Executor = Annotated[str, tyro.conf.arg(metavar="local|tcp://HOST:PORT|MODULE:FUNCTION")]
Seeds = Annotated[Count, Field(le=1000)]
Split = Literal["test", "train", "validation"]

app, study_app = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
NAMED: dict[str, tyro.extras.SubcommandApp] = {}  # each alone, by what a person types: `evaluate`, `study gap`


def command(function: Callable[..., Job], of: tyro.extras.SubcommandApp = app) -> Callable[..., Job]:
    """Makes a command of a function, whose arguments are held to what their types say."""
    valid = pydantic.validate_call(config=pydantic.ConfigDict(allow_inf_nan=False))(function)

    @functools.wraps(function)
    def call(*arguments: object, **named: object) -> Job:
        try:
            return valid(*arguments, **named)
        except pydantic.ValidationError as error:
            raise refusal(error) from None

    of.command(call)
    alone = tyro.extras.SubcommandApp()
    alone.command(call)
    NAMED[f"study {function.__name__}" if of is study_app else function.__name__] = alone
    return call


def study_command(function: Callable[..., Job]) -> Callable[..., Job]:
    """The same, for `saltflat study NAME`."""
    return command(function, study_app)


def check_points(points: int) -> None:
    """BadInput unless so many values of alpha have 0 in their middle."""
    if not 3 <= points <= 9999 or points % 2 == 0:
        raise BadInput(f"points: expected an odd number >= 3, and at most 9999, got {points}")
