"""What was trained: a row per recipe, in the words that papers use, out of the runs' configs."""

from collections.abc import Sequence

from saltflat.lab.report.notation import MISSING, counted
from saltflat.lab.report.runs import Run
from saltflat.lab.report.statistics import Group
from saltflat.lab.report.tables import Body, Cell, Column, Row, Table


def trained_table(groups: Sequence[Group]) -> Table:
    """Data, network, what was minimised, both adversaries, and for how long."""
    return Table(
        label="What was trained",
        caption="As asked for; every field stands under Configuration.",
        columns=(
            Column("data", "", "data"),
            Column("network", "", "network"),
            Column("objective", "", "objective"),
            Column("attack", "in training", "attack"),
            Column("weights", "perturbation", "perturbation"),
            Column("epochs", "done of asked", "epochs"),
            Column("seeds", "", "seed"),
        ),
        bodies=tuple(Body(group.name, group.series, (Row("", _cells(group)),)) for group in groups),
    )


def _cells(group: Group) -> tuple[Cell, ...]:
    run = group.runs[0]
    seeds = ", ".join(str(one.seed) for one in group.runs)
    words = (_data(run), _network(run), _objective(run), _attack(run), _perturbation(run))
    return (*map(Cell, words), Cell(f"{group.last_epoch} of {_of(run, 'optimizer.epochs')}"), Cell(seeds))


def _of(run: Run, key: str) -> str:
    return run.config.get(key, MISSING)


def _data(run: Run) -> str:
    examples = _of(run, "data.examples")
    return _of(run, "data.name") + (f", {examples} images" if examples.isdigit() and int(examples) else "")


def _network(run: Run) -> str:
    name, width = _of(run, "model.name"), _of(run, "model.width")
    if name == "wide-resnet":
        return f"{name}-{_of(run, 'model.depth')}-{_of(run, 'model.widen_factor')}"
    return name + (f", width {width}" if width.isdigit() and int(width) else "")


def _objective(run: Run) -> str:
    name = _of(run, "objective.name")
    return f"{name}, β {_of(run, 'objective.beta')}" if name in ("trades", "mart", "alp") else name


def _attack(run: Run) -> str:
    steps, replays = _of(run, "attack.steps"), _of(run, "attack.replays")
    if _of(run, "objective.name") == "natural":
        return "none"
    budget = f"{_of(run, 'attack.norm')}, eps {_of(run, 'attack.eps')}"
    if replays.isdigit() and int(replays):
        return f"free, {counted(int(replays), 'replay')}, {budget}"
    return f"{counted(int(steps), 'step')}, {budget}" if steps.isdigit() else budget


def _perturbation(run: Run) -> str:
    gamma = _of(run, "awp.gamma")
    return "none" if gamma in ("0", "0.0") else f"{_of(run, 'awp.method')}, γ {gamma}"
