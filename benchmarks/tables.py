"""What the records of `evaluation_parity.py` and `evaluation_speed.py` show, as Markdown."""

import json
from pathlib import Path
from typing import Any


def compared(record: Path) -> str:
    """One table of parity-*.json, one of speed-*.json, each with what was run on what."""
    parity = [json.loads(path.read_text()) for path in sorted(record.glob("parity-*.json"))]
    speed = [json.loads(path.read_text()) for path in sorted(record.glob("speed-*.json"))]
    return "\n\n".join(_parity(parity) + _speed(speed))


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
