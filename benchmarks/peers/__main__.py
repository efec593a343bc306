"""What other people's code for the same purposes does: counted, run, and read.

    python -m benchmarks.peers --sources FOLDER --python ENVIRONMENT/bin/python --out peers.json

FOLDER holds clones of the repositories in `reading.toml`, each named owner+name (`git clone
https://github.com/csdongxian/AWP FOLDER/csdongxian+AWP`). The environment is one of their own, with torch, what they
need beside it, and pyautoattack and pyhessian from PyPI; Saltflat is taken from this checkout. Nothing is downloaded,
and no repository is changed. Runs of ours and of theirs go through the same hooks (`counting`), each in a process of
its own. What is on record is not run again, so that an interrupted run goes on; delete the file to begin anew.

There are no seconds in it: counts stand for cost, and are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.probes import folder, probes
from benchmarks.peers.reading import facts, peers

ROOT = Path(__file__).parent.parent.parent
VERSIONS = "import torch, numpy, platform; print(platform.python_version(), torch.__version__, numpy.__version__)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="the folder of the clones")
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of the peers' environment")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for name, path in (("sources", given.sources), ("python", given.python)):
        if not path.exists():
            parser.error(f"--{name}: expected what exists, got {str(path)!r}")
    missing = [peer for peer in peers() if peer != "Saltflat" and not folder(given.sources, peer).is_dir()]
    if missing:
        parser.error(f"--sources: expected clones named owner+name, without those of {', '.join(missing)}")

    record = json.loads(given.out.read_text()) if given.out.is_file() else {}
    record["environment"] = dict(
        zip(("python", "torch", "numpy"), _answer(given.python, "-c", VERSIONS).split(), strict=True)
    )
    sources = given.sources.absolute()
    record["peers"] = {peer: {**about, **_version(peer, sources)} for peer, about in peers().items()}
    record["read"] = [fact.as_record() for fact in facts(sources, ROOT, record["peers"])]
    for name in probes():
        what, peer, which = name.split(": ")
        by_name: dict[str, Any] = record.setdefault(what, {}).setdefault(peer, {})
        if which not in by_name:
            print(name, end=": ", flush=True)
            answer = _answer(given.python, "-m", "benchmarks.peers.probes", str(sources), name)
            by_name[which] = json.loads(answer.splitlines()[-1])
            print(by_name[which], flush=True)
        _write(given.out, record)


def _answer(python: Path, *arguments: str) -> str:
    """What that interpreter prints, with this checkout to import from."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [str(python.absolute()), "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr}")
    return done.stdout.strip()


def _version(peer: str, sources: Path) -> dict[str, Any]:
    """The commit that is looked at, its date, and what lies there: a licence, and how many files of tests."""
    of = ROOT if peer == "Saltflat" else folder(sources, peer)
    commit, date = _git(of, "log", "-1", "--format=%H %cs").split()
    files = [Path(name) for name in _git(of, "ls-tree", "-r", "--name-only", "HEAD").splitlines()]
    tests = [path for path in files if path.suffix == ".py" and path.name.startswith("test_")]
    licences = [path.name for path in files if len(path.parts) == 1 and path.stem.lower() in ("license", "licence")]
    return {"commit": commit, "date": date, "licence file": " ".join(licences), "test files": len(tests)}


def _git(of: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(of), *arguments], capture_output=True, text=True, check=True).stdout


def _write(path: Path, record: dict[str, Any]) -> None:
    growing = path.with_suffix(".growing")
    growing.write_text(json.dumps(record, indent=1) + "\n")
    growing.replace(path)


if __name__ == "__main__":
    main()
