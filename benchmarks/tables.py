"""What the records of the other scripts show, as Markdown."""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def compared(record: Path) -> str:
    """A table or two of every kind of file that is there: parity-*.json, speed-*.json, training-step*.json,
    profile*.json, memory*.json, growth*.json, data-pipeline*.json, first-step*.json, scaling*.json, arms*.json,
    alignment*.json; each with what was run on what.
    """

    def found(pattern: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(record.glob(pattern))]

    parts = _parity(found("parity-*.json")) + _speed(found("speed-*.json"))
    for pattern, shown in SHOWN.items():
        for each in found(pattern):
            parts += shown(each)
    return "\n\n".join(parts)


def _parity(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    rows = ["| network | threat | n | seeds | pyautoattack | fp32 | bf16 | fp32 − pyautoattack | verdicts that agree |"]
    rows.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for each in found:
        names = ("pyautoattack", "saltflat fp32", "saltflat bf16")
        cells = [f"{each['mean'][name]:.2f} ± {each['standard_deviation'][name]:.2f}" for name in names]
        ours = each["compared"]["saltflat fp32"]
        where = f"| {each['run']} | {each['norm']}, eps {each['eps']} | {each['n']} | {ours['seeds']} "
        ahead = f"| {ours['difference_in_points']:+.2f} | {ours['verdicts_that_agree']:.2%} |"
        rows.append(f"{where}| {' | '.join(cells)} {ahead}")
    words = (
        "Robust accuracy in percent under AutoAttack's standard version, full budgets, mean ± sample standard "
        "deviation over seeds, on the same examples; the difference is in points, verdicts are compared seed by seed."
    )
    return [f"**The number**: {words}", "\n".join(rows)]


def _speed(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    rows = ["| network | threat | n | robust | | seconds | of it in the model | ratio | verdicts that differ |"]
    rows.append("| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for each in found:
        for name in ("pyautoattack", "fp32", "bf16"):
            runs = [of[name] for of in each["rounds"]]
            seconds, share = (sorted(run[key] for run in runs)[len(runs) // 2] for key in ("seconds", "in_model"))
            ours = each["summary"].get(name)
            ratios = f"{ours['median']:.2f} ({min(ours['ratios']):.2f} to {max(ours['ratios']):.2f})" if ours else ""
            differ = str(ours["verdicts_that_differ"]) if ours else ""
            first = name == "pyautoattack"
            where = [each["run"], f"{each['norm']}, eps {each['eps']}", str(each["n"])] if first else ["", "", ""]
            cells = [*where, str(runs[0]["robust"]), name if first else f"here, {name}", f"{seconds:.0f}"]
            rows.append(f"| {' | '.join(cells)} | {share:.0%} | {ratios} | {differ} |")
    machine = found[0]["environment"]
    rounds = " and ".join(sorted({str(len(each["rounds"])) for each in found}))
    words = (
        f"The same with full budgets in {rounds} alternating rounds in one process on {machine['threads']} threads of "
        f"{machine['processor']}, torch {machine['torch']}; medians, and ratios of the runs of one round (smallest to "
        "largest). In bf16 every success is asked again in fp32."
    )
    return [f"**The time**: {words}", "\n".join(rows)]


def _training_step(found: dict[str, Any]) -> list[str]:
    summary, turns = found["summary"], found["turns"]
    beside = {"times faster than official": "times_faster"}
    if any("times_faster_than_art" in of for of in summary.values()):
        beside["times faster than ART"] = "times_faster_than_art"
    beside["over the floor"] = "over_floor"
    head = ("", "seconds a step", *beside, "of peak", "memory, MiB")
    rows = []
    for name, of in summary.items():
        share = f"{of['share_of_peak']:.0%}" if "share_of_peak" in of else ""
        memory = turns[name].get("peak_gpu_bytes", turns[name]["peak_bytes"]) / 2**20
        cells = [_around(of["seconds"], ".3f"), *(_around(of.get(key)) for key in beside.values())]
        rows.append([name, *cells, share, f"{memory:.0f}"])
    peaks = ", ".join(f"{of['flops_per_second'] / 1e9:.0f} Gflop/s in {name}" for name, of in found["peak"].items())
    words = (
        f"{_setting(found)}; {found['rounds']} rounds in which every contender, in a process of its own, takes its "
        f"turn, on {_machine(found)}. Medians, and the smallest to the largest; ratios are of turns of one round, to "
        "the paper's procedure with its attack in the same mode, as torch is by default, and only for steps that do "
        "the same work; and to the floor, torch's direct convolutions of the plain step in the same precision, alone, "
        "with weights that are not packed beforehand. The share of the peak is of direct convolutions' operations, of "
        f"which Winograd's way needs fewer. Peak, measured: {peaks}."
    )
    parts = [f"**A step of training**: {words}", _markdown(head, rows)]
    if found["added"]:
        shares = [[name, _around(of, ".1%"), f"{of['n']:.0f}"] for name, of in found["added"].items()]
        parts.append(_markdown(("", "seconds added, or taken", "n"), shares))
    return parts


def _profile(found: dict[str, Any]) -> list[str]:
    taken = found["taken"]
    rows = [[name, f"{1e3 * each:.1f}", f"{each / taken['all']:.1%}"] for name, each in taken.items()]
    words = f"{found['contender']}, {_setting(found)}, on {_machine(found)}; under a profiler, which costs some itself."
    return [f"**Where the time goes**: {words}", _markdown(("", "ms a step", "share"), rows)]


def _memory(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, of in found["copies_over_at"].items():
        counted = f"{found['bytes'][name]['counted'] / 2**20:.1f}"
        rows.append([name, counted, f"{of['counted']:+.3f}", _around(of["measured"], "+.2f")])
    words = (
        f"{_setting(found)}. Tensors alive at the peak, counted operation by operation, and what {found['rounds']} "
        f"processes held at most, on {_machine(found)}; beyond AT in copies of the perturbed weights, of "
        f"{found['copy_bytes'] / 2**20:.1f} MiB each."
    )
    head = ("", "counted, MiB", "copies over AT, counted", "copies over AT, measured")
    return [f"**Memory**: {words}", _markdown(head, rows)]


def _growth(found: dict[str, Any]) -> list[str]:
    rows = []
    for argument, of in found["growth"].items():
        values = ", ".join(str(value) for value in of["values"])
        rows.append([argument, values, _around(of["slope"]), f"{of['slope_of_flops']:.2f}"])
    words = (
        f"slopes of log seconds over log argument, and over {found['rounds']} rounds their smallest to largest, of "
        f"steps of a small residual network on {_machine(found)}."
    )
    return [f"**Growth**: {words}", _markdown(("", "values", "slope", "of the convolutions' flops"), rows)]


def _data_pipeline(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, _around(of["images_per_second"], ".0f"), _around(of["share_of_step"], ".2%")]
        for name, of in found["summary"].items()
    ]
    words = f"batches made alone, and as a share of a step; {_setting(found)}, {found['rounds']} rounds on "
    head = ("", "images a second", "of a step's time")
    return [f"**Data**: {words}{_machine(found)}.", _markdown(head, rows)]


def _first_step(found: dict[str, Any]) -> list[str]:
    summary = {re.sub("^ +", "of it: ", name): of for name, of in found["summary"].items()}
    rows = [[name, _around(of, ".2f")] for name, of in summary.items()]
    words = (
        f"seconds of {found['rounds']} new processes each, PreActResNet-18, batch {found['batch_size']}, PGD-10, on "
        f"{_machine(found)}; the parts of the first step are those that its process tells."
    )
    return [f"**Until something happens**: {words}", _markdown(("", "seconds"), rows)]


def _scaling(found: dict[str, Any]) -> list[str]:
    rows, summary = [], found["summary"]
    for name, of in summary.items():
        if "rows" in of:
            cells = [str(of["rows"]), _around(of["seconds"], ".3f"), _around(of["rows_a_second"])]
            parts = of.get("parts", {})
            expected = [f"{parts[part]:.3f}" if parts else "" for part in ("compute", "sharing", "communication")]
            rows.append([name, *cells, *expected, _around(of.get("over_predicted"))])
    head = ("", "rows each", "seconds a step", "rows a second")
    head += ("compute, s", "sharing, s", "sent, s", "measured over predicted")
    words = (
        f"{_setting(found).replace('batch', 'n =')}, AT-AWP; {found['rounds']} rounds in which every contender takes "
        f"its turn, each of its processes on {_machine(found)}, unless it says otherwise. Medians, and the smallest to "
        "the largest; rows a second are in those of 1 process, round by round. Predicted are the seconds of one "
        "process, what sharing the machine costs two that know nothing of each other, and what the collectives of a "
        "step take alone."
    )
    alone = []
    for name in ("all-reduce", "gather", "scatter", "all-reduce of a number", "checkpoint"):
        if name in summary:
            seconds, size = summary[name]["seconds"], found["bytes"].get(name)
            told = ("", "") if size is None else (f"{size / 1e6:.1f}", f"{size / seconds['median'] / 1e6:.0f}")
            in_ms = {each: 1e3 * seconds[each] for each in ("median", "min", "max")}
            alone.append([name, told[0], _around(in_ms, ".1f"), told[1]])
    sent = [
        [name, kind, str(each["number"]), f"{each['bytes'] / 1e6:.1f}"]
        for name, of in found["sent"].items()
        for kind, each in of.items()
    ]
    return [
        f"**One training on two processes**: {words}",
        _markdown(head, rows),
        "**Alone**: collectives of the model's gradient between two processes; a checkpoint, on the disk.",
        _markdown(("", "MB", "ms", "MB a second"), alone),
        "**What a step sends**, counted.",
        _markdown(("", "collective", "number", "MB"), sent),
    ]


def planned(parts: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]) -> str:
    """Words and a table of each."""
    return "\n\n".join(text for words, head, rows in parts for text in (words, _markdown(head, rows)))


def arms_beside(arms: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    """A row an arm, the reference first: every quantity, and below it how far that is from the reference's."""
    names = list(arms[reference]["values"])
    rows = []
    for arm in (reference, *(other for other in arms if other != reference)):
        of = arms[arm]
        rows.append([f"**{arm}**", str(of["n"]), *(_over_seeds(of["values"][name], "") for name in names)])
        if arm != reference:
            rows.append([f"− {reference}", "", *(_over_seeds(of["differences"][name], "+") for name in names)])
    return _markdown(("", "n", *names), rows)


def _over_seeds(by_seed: Mapping[Any, float], sign: str) -> str:
    """Mean and sample standard deviation."""
    values = list(by_seed.values())
    if len(values) < 2:
        return f"{values[0]:{sign}.2f}" if values else ""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    places = max(0, min(4, 1 - math.floor(math.log10(deviation)))) if deviation > 0 else 2
    return f"{mean:{sign}.{places}f} ± {deviation:.{places}f}"


def _arms(found: dict[str, Any]) -> list[str]:
    of = found["config"]
    words = (
        f"{of['model.name']} on {of['data.name']}, {of['data.examples']} training images, "
        f"{of['optimizer.epochs']} epochs, the last epoch, at w; mean ± sample "
        "standard deviation over n seeds; below, of the differences seed by seed."
    )
    return [f"**Arms**: {words}", arms_beside(found["arms"], found["reference"])]


def around_mean(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, which a single value has not.

    >>> around_mean([1.0, 3.0]), around_mean([1.0])
    ('2.000 ± 1.414', '1.000')
    """
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def _alignment(found: dict[str, Any]) -> list[str]:
    rows = []
    for run, by_mode in found["cosines"].items():
        cells = [around_mean(values) for values in by_mode.values()]
        rows.append([run, *cells])
    words = (
        f"cosines between AWP's displacement and the amortised one, on the checkpoint {found['checkpoint']} of runs, "
        f"{found['batches']} training batches each; mean ± sample standard deviation over batches."
    )
    modes = ("joint gradient in the attack's mode", "in the mode of training")
    return [f"**Directions**: {words}", _markdown(("run", *modes), rows)]


SHOWN = {
    "arms*.json": _arms,
    "alignment*.json": _alignment,
    "training-step*.json": _training_step,
    "profile*.json": _profile,
    "memory*.json": _memory,
    "growth*.json": _growth,
    "data-pipeline*.json": _data_pipeline,
    "first-step*.json": _first_step,
    "scaling*.json": _scaling,
}


def _setting(found: Mapping[str, Any]) -> str:
    of = found["setting"]
    size, attack = f"{of['size']} x {of['size']}", f"PGD-{of['steps']}"
    return f"{of['network']}, {of['objective'].upper()}, batch {of['batch_size']} of {size}, {attack}"


def _machine(found: Mapping[str, Any]) -> str:
    """Where, in words: the GPU by its name, or the CPU and its threads."""
    of = found["environment"]
    if of["cuda"] is not None:
        return f"{of['device']}, torch {of['torch']}"
    threads = "one thread" if of["threads"] == 1 else f"{of['threads']} threads"
    return f"{threads} of {of['processor']}, torch {of['torch']}"


def _around(of: Mapping[str, float] | None, form: str = ".2f") -> str:
    return "" if of is None else f"{of['median']:{form}} ({of['min']:{form}} to {of['max']:{form}})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, marks, *rows])
