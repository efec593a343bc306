"""The run folder: what is written, when, and so that nothing is ever half there.

    config.yaml  environment.json  evaluation.json    once, at the start
    metrics.jsonl                                     a line after every epoch; the sum of `seconds` is training's
    checkpoints/last.safetensors                      weights, after every epoch
    checkpoints/best.safetensors                      weights, after every epoch that is the best on validation so far
    checkpoints/epoch-N.safetensors                   weights of epochs that keep_every asks for
    checkpoints/resume.pt                             all that `fit` needs to go on, written last
    outcomes/  landscapes/  flatness/  gaps/          what `evaluate`, `landscape`, `flatness` and `study` find

Every file but the metrics is written beside its place, flushed to the disk, and renamed into it. A line of metrics may
be there without its checkpoint (killed in between); going on drops it, and the epoch is made again, equal.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saltflat.lab.config import BadInput, Train, as_text, from_text


def create(folder: Path, config: Train, environment: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Make the folder of a new run, whole or not at all; BadInput if something is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(
            f"out: expected a folder that does not exist yet, got {str(folder)!r} (go on with --resume {folder})"
        )
    growing = folder.absolute().with_name(f".{folder.absolute().name}.new")
    try:
        shutil.rmtree(growing, ignore_errors=True)  # of one that was killed right here
        (growing / "checkpoints").mkdir(parents=True)
        write_json(growing / "environment.json", environment)
        write_json(growing / "evaluation.json", evaluation)
        write_text(growing / "config.yaml", as_text(config))
        growing.rename(folder.absolute())
    except OSError as error:
        raise BadInput(f"out: cannot make {str(folder)!r}: {error.strerror}") from None


def read_config(folder: Path) -> Train:
    """The config of a run; BadInput if the folder is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise BadInput(f"run: expected a run folder with a config.yaml, got {str(folder)!r}")
    try:
        return from_text(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"run: {path}: {error}") from None


def append_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """One line, on the disk when this returns."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines, up to one that was cut when the run was killed."""
    path, found = folder / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(metrics, dict) or not isinstance(metrics.get("epoch"), int):
            break
        found.append(metrics)
    return found


def keep_metrics_until(folder: Path, epoch: int) -> None:
    """Drop what was written of later epochs, and a line that was cut."""
    kept = [line for line in read_metrics(folder) if line["epoch"] <= epoch]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def check_folder(field: str, folder: Path) -> None:
    """BadInput unless such a folder is there or can be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise BadInput(f"{field}: expected a folder, got {str(folder)!r}, and {there} is a file")


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """BadInput if another process is in such a block for the same file, which is there as long as the block. Where the
    system has no such locks, nobody is kept out.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before the lock goes, or it would be the next one's
        os.close(handle)


def _locked(lock: Path) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT)
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(lock, handle):
                return handle
        except ImportError:
            return handle
        except OSError:
            os.close(handle)
            raise BadInput(f"out: another process is at work on {lock.with_suffix('')}") from None
        os.close(handle)  # it was the file of somebody who has just left


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block is left well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")  # one name, so that what a killed process left is overwritten
    try:
        yield temporary
        _flushed(temporary)
        temporary.replace(path)
        _flushed(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flushed(path: Path) -> None:
    """On the disk, be it a file or a folder's list of files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_again(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """A finding that is there already; BadInput if it is not whole, or lacks one of the needed fields."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path.parent.name}: {path} is not a whole file ({error}); delete it to begin anew") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path.parent.name}: {path}: expected named fields; delete it to begin anew")
    if lacking := [name for name in needed if name not in found]:
        raise BadInput(f"{path.parent.name}: {path} is not whole, it lacks {lacking[0]}; delete it to begin anew")
    return found


def digest(settings: dict[str, Any]) -> str:
    """Eight characters for a file name: equal settings overwrite their own earlier, equal, results and nothing else."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def environment(device: str, threads: int, cuda: str | None) -> dict[str, Any]:
    """What a number may depend on besides its config."""
    return {
        "saltflat": importlib.metadata.version("saltflat"),
        "torch": importlib.metadata.version("torch"),
        "cuda": cuda,
        "numpy": importlib.metadata.version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "git": _git(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that the package runs from, if it does."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) / "src" / "saltflat" / "lab" != here:
            return None  # installed into somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
