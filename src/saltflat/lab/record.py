"""The run folder: what is written, when, and so that nothing is ever half there.

    config.yaml  environment.json  evaluation.json    once, at the start
    metrics.jsonl                                     a line after every epoch; the sum of `seconds` is training's
    checkpoints/last.safetensors                      weights, after every epoch
    checkpoints/best.safetensors                      weights, after every epoch that is the best on validation so far
    checkpoints/epoch-N.safetensors                   weights of epochs that keep_every asks for
    checkpoints/resume-STEP-SHA.pt                    all that `fit` needs to go on, the metrics so far among it: after
                                                      every epoch, within long ones, and when told to stop; two are kept
    outcomes/  examples/  landscapes/  flatness/  gaps/  what `evaluate`, `landscape`, `flatness`, `study` find

Every file but the metrics is written beside its place, flushed to the disk, and renamed into it. A line of metrics may
be there without its checkpoint (killed in between); going on drops it, and the epoch is made again, equal.

Every file says what its content has to be, in a checksum of its own: JSON in its last field ("seal"), a line of metrics
likewise, config.yaml in its first line (of what decides the numbers; where the data lie may be changed), weights in
their header, checkpoints in their name. What was damaged is refused, or made anew from what is whole; it is never read
as if it were right.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saltflat.lab.config import BadInput, Train, as_text, from_text, read_yaml

DECIDES = "# decides: "  # the first line of a config.yaml, before a digest
# Where, and on how many threads, a run goes on may change, and what is kept of it
FREE: tuple[str, ...] = ("device", "threads", "keep_every", "checkpoint_minutes")
FREE += ("data.path", "data.workers", "extra.path", "model.initial")


def create(folder: Path, config: Train, environment: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Make the folder of a new run, whole or not at all; BadInput if something is there already.

    Of several processes that make one at once, the first to be done has made it, and the others find it there.
    """
    there = f"out: expected a folder that does not exist yet, got {str(folder)!r} (go on with --resume {folder})"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(there)
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _growing(folder.absolute()) as growing:
            (growing / "checkpoints").mkdir()
            write_json(growing / "environment.json", environment)
            write_json(growing / "evaluation.json", evaluation)
            write_config(growing, config)
            growing.rename(folder.absolute())
            _flushed(parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir():  # another's, since we looked
            raise BadInput(there) from None
        raise BadInput(f"out: cannot make {str(folder)!r}: {error.strerror}") from None


@contextmanager
def _growing(folder: Path) -> Iterator[Path]:
    """A new folder beside that one, which is gone after the block if it was not renamed; so are those that processes
    left that were killed in such a block. Each is held by whoever makes it, so that it is known which nobody makes;
    between the making and the holding, the folder around it is held, or nothing is cleared.
    """
    start = f".{folder.name[:50]}."
    growing = folder.with_name(f"{start}{secrets.token_hex(4)}.new")
    ours = re.compile(re.escape(start) + r"[0-9a-f]{8}\.new")
    with ExitStack() as making:
        with _held(folder.parent, patience=1.0) as cleared:
            for left in [path for path in folder.parent.glob("*.new") if ours.fullmatch(path.name) and path.is_dir()]:
                with _held(left) as nobodys:
                    if cleared and nobodys:
                        shutil.rmtree(left, ignore_errors=True)
            growing.mkdir()
            making.enter_context(_held(growing))
        making.callback(shutil.rmtree, growing, ignore_errors=True)
        yield growing


@contextmanager
def _held(folder: Path, patience: float = 0.0) -> Iterator[bool]:
    """Whether this process alone holds the folder inside the block, after so many seconds at most; never, where the
    system has no such locks.
    """
    with ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            yield False
            return
        stack.callback(os.close, handle)
        until = time.monotonic() + patience
        while not (taken := _taken(handle)) and time.monotonic() < until:
            time.sleep(0.02)
        yield taken


def _taken(handle: int) -> bool:
    """Whether the lock of what is open was free, and is this process' now."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def write_config(folder: Path, config: Train) -> None:
    """config.yaml of a run; its first line is a digest of what decides numbers."""
    text = as_text(config)
    write_text(folder / "config.yaml", f"{DECIDES}{digest(deciding(read_yaml(text, 'config')))}\n{text}")


def read_config(folder: Path) -> Train:
    """The config of a run; BadInput if the folder is none, or if what decides the run's numbers is not as it was."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise BadInput(f"run: expected a run folder with a config.yaml, got {str(folder)!r}")
    try:
        text = path.read_text()
        config, written = from_text(text), digest(deciding(read_yaml(text, "config")))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"run: {path}: {error}") from None
    first = text.partition("\n")[0]
    if first.startswith(DECIDES) and first.removeprefix(DECIDES) != written:
        raise BadInput(f"run: {path} was changed or damaged since the run began: put it back, or begin a new run")
    return config


def deciding(fields: dict[str, Any]) -> dict[str, Any]:
    """Of a config's fields, those that decide a run's numbers. Only fields that are there: a file of before there was
    one has the digest that it always had.

    >>> deciding({"seed": 1, "threads": 2, "data": {"name": "svhn", "path": "here"}})
    {'seed': 1, 'data': {'name': 'svhn'}}
    """
    found = {name: dict(part) if isinstance(part, dict) else part for name, part in fields.items()}
    for name in FREE:
        section, _, leaf = name.rpartition(".")
        (found.get(section, {}) if section else found).pop(leaf, None)
    return found


def append_metrics(folder: Path, metrics: dict[str, Any]) -> str:
    """One line, on the disk when this returns; returns it."""
    line = json.dumps(sealed(metrics))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    return line


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines, up to one that was cut when the run was killed; BadInput for any other that is not whole."""
    path, found = folder / "metrics.jsonl", []
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            metrics = unsealed(json.loads(line))
            if not isinstance(metrics.get("epoch"), int):
                raise ValueError
        except (ValueError, RecursionError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise BadInput(
                f"run: {path}: line {number} is damaged; saltflat train --resume {folder} makes it anew"
            ) from None
        found.append(metrics)
    return found


def count_metrics(folder: Path) -> int:
    """Whole lines of metrics, as they are."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def write_metrics(folder: Path, lines: Sequence[str]) -> None:
    """All lines, in place of what is there."""
    write_text(folder / "metrics.jsonl", "".join(line + "\n" for line in lines))


SEAL = re.compile(r"[0-9a-f]{8}")  # by which it is known under a name that was damaged


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The same, with its checksum as the last field."""
    return {**content, "seal": digest(content)}


def unsealed(content: Any) -> dict[str, Any]:
    """What was sealed; ValueError if it is not what it was then. What has no seal, an earlier version's, passes."""
    if not isinstance(content, dict):
        raise ValueError("expected named fields")
    found = {name: value for name, value in content.items() if name != "seal"}
    last = str(next(reversed(content.values()), ""))
    if content.get("seal", digest(found)) != digest(found) or ("seal" not in content and SEAL.fullmatch(last)):
        raise ValueError("it is not what was written")
    return found


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
        except BlockingIOError:
            os.close(handle)
            raise BadInput(f"out: another process is at work on {lock.with_suffix('')}") from None
        except (ImportError, OSError):
            return handle
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
    """The text as a file that is there whole, or not."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """With its seal."""
    write_text(path, json.dumps(sealed(content), indent=1) + "\n")


def read_again(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """A finding that is there already; BadInput if it is not whole, or lacks one of the needed fields."""
    try:
        found = unsealed(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path.parent.name}: {path} is not a whole file ({error}); delete it to begin anew") from None
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
