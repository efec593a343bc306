"""Work on models through executors: who is refused, what is told, and that numbers are equal wherever they are made."""

import ast
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import small_grid
import torch
import working
from commands import run

from saltflat.lab.config import BadInput
from saltflat.lab.study import executors
from saltflat.lab.study.models import rows
from saltflat.lab.study.workers import Home, _worked, side_by_side

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "cluster.md").read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["cluster"], "expected local, tcp://HOST:PORT of a Dask scheduler, or package.module:function, got 'cluster'"),
        (["host:8786"], "or package.module:function, got 'host:8786'"),
        (["working:__import__('os')"], "or package.module:function, got"),
        ([""], "got ''"),
        (["nowhere_at_all:pool"], "cannot import 'nowhere_at_all:pool': ModuleNotFoundError"),
        (["working:nothing"], "cannot import 'working:nothing': AttributeError"),
        (["working:__name__"], "expected a function at 'working:__name__', got str"),
        (["working:squared"], "working:squared() failed: TypeError"),
        (["builtins:dict"], "expected something with `submit` from builtins:dict(), got dict"),
        (["tcp://127.0.0.1:9"], "expected a Dask scheduler at 'tcp://127.0.0.1:9', got none"),
        (["what://is.this:1"], "expected a Dask scheduler at 'what://is.this:1', got none"),
        (["tcp://127.0.0.1:9", "--workers", "2"], "expected none beside the executor 'tcp://127.0.0.1:9'"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.setattr(executors, "PATIENCE", 0.5)
    with pytest.raises(SystemExit) as stop:
        run("study", "compare", "at", "--out", tmp_path / "study", "--executor", *words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("saltflat: executor: ", "saltflat: workers: "))
    assert why in line
    assert not (tmp_path / "study").exists()


def test_without_dask_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(BadInput, match=r"executor: Dask is not installed; .*saltflat\[cluster\]"):
        with executors.named("tcp://127.0.0.1:8786", 0, "cpu")():
            pass


def test_an_executor_may_lie_in_the_current_folder_and_is_left_at_the_end(tmp_path, monkeypatch):
    (tmp_path / "engines_of_mine.py").write_text(
        "from contextlib import contextmanager\nfrom types import SimpleNamespace\nseen = []\n"
        "class Mine:\n"
        "    def __enter__(self):\n        seen.append('entered')\n        return self\n"
        "    def __exit__(self, *_):\n        seen.append('left')\n"
        "    def submit(self, work, *given):\n        return work\n"
        "def bare():\n    return SimpleNamespace(submit=lambda work: work)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with executors.named("engines_of_mine:Mine", 0, "cpu")() as mine:
        assert mine.submit(len) is len
    assert sys.modules.pop("engines_of_mine").seen == ["entered", "left"]
    with executors.named("engines_of_mine:bare", 0, "cpu")() as bare:  # no context manager
        assert bare.submit(len) is len
    del sys.modules["engines_of_mine"]


def test_processes_of_torchrun_are_refused_since_workers_would_wait_for_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="executor: expected a process by itself, got one of torchrun's 2"):
        executors.named("local", 0, "cpu")


def test_threads_of_the_study_s_own_process_are_refused(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(BadInput, match="executor: expected one that works in other processes, got threads"):
            side_by_side(working.squared, {"a": 1, "b": 2}, pool, tmp_path, str)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forks_of_the_study_s_process_are_refused_as_what_they_are(tmp_path):
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        with pytest.raises(BadInput, match=r"executor: expected processes that begin anew, .*, got a fork of this one"):
            side_by_side(working.squared, {"a": 1}, pool, tmp_path, str)


class Told:
    """A future that is told what becomes of it."""

    def __init__(self, of):
        self.of, self.cancelled = of, False

    def done(self):
        return self.of is not None

    def result(self):
        if isinstance(self.of, BaseException):
            raise self.of
        return self.of

    def cancel(self):
        self.cancelled = True


@pytest.mark.parametrize(
    ("end", "raised", "why"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            RuntimeError("the node\nis gone. Ask its owner"),
            OSError,
            r"at b \(RuntimeError: the node is gone\), perhaps",
        ),
    ],
)
def test_what_has_not_begun_is_cancelled_and_what_is_of_the_executor_is_one_line(tmp_path, end, raised, why):
    futures = []

    class Pool:
        def submit(self, work, given, over, home, name):
            futures.append(Told({"a": None, "b": end, "c": None}[name]))
            return futures[-1]

    with pytest.raises(raised, match=why) as found:
        side_by_side(working.squared, {"a": 0, "b": 1, "c": 2}, Pool(), tmp_path, str)
    assert all(future.cancelled for future in futures)
    assert "\n" not in str(found.value)
    assert not (tmp_path / ".study").exists()


def elsewhere(folder: Path, word: str = "hello") -> Home:
    """As it comes to a worker in another process, of a study in that folder."""
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / ".study").write_text("hello")
    return Home(folder, folder / "logs", word)


@pytest.mark.parametrize("lacking", ["folder", "mark", "word"])
def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path, lacking):
    home = elsewhere(tmp_path, "goodbye" if lacking == "word" else "hello")
    if lacking == "folder":
        home = Home(tmp_path / "nowhere", tmp_path / "nowhere" / "logs", "hello")
    if lacking == "mark":
        home.mark.unlink()
    found = _worked(working.squared, 3, home, "a")
    with pytest.raises(
        OSError, match=r"a worker on .* does not see .* as the study does: put the study where"
    ) as raised:
        found.unwrapped()
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("*.log"))


def test_work_sees_the_study_s_folder_and_one_thread_and_the_worker_gets_its_own_back(tmp_path, monkeypatch):
    (tmp_path / "worker").mkdir()
    (tmp_path / "study").mkdir()
    home = elsewhere(tmp_path / "study")
    monkeypatch.chdir(tmp_path / "worker")
    torch.set_num_threads(2)
    before = list(sys.path)
    assert _worked(working.surroundings, None, home, "a").unwrapped() == (str(home.folder), 1, "")
    assert (os.getcwd(), torch.get_num_threads(), sys.path) == (str(tmp_path / "worker"), 2, before)


def test_threads_of_a_worker_take_turns(tmp_path):
    """As those of a Dask worker that was started with several."""
    home, inside, most = elsewhere(tmp_path), [], []
    lock = threading.Lock()

    def work(n: int) -> int:
        with lock:
            inside.append(n)
            most.append(len(inside))
        time.sleep(0.02)
        print(n)
        with lock:
            inside.remove(n)
        return n

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: _worked(work, n, home, str(n)).unwrapped(), range(8)))
    assert found == list(range(8))
    assert max(most) == 1
    assert [(home.logs / f"{n}.log").read_text() for n in range(8)] == [f"{n}\n" for n in range(8)]


def test_what_work_raises_keeps_its_traceback_for_those_who_look(tmp_path):
    with pytest.raises(ValueError, match=r"^n: expected anything but 1, got 1") as raised:
        _worked(working.refused, 1, elsewhere(tmp_path), "a").unwrapped()
    assert str(raised.value) == "n: expected anything but 1, got 1"
    assert "in refused" in raised.value.__notes__[0]


# The page


def test_the_page_names_its_functions_and_they_are_python():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    defined = {node.name for block in blocks for node in ast.parse(block).body if isinstance(node, ast.FunctionDef)}
    assert defined == set(re.findall(r"--executor engines:(\w+)", PAGE))
    names: dict[str, object] = {}
    exec(blocks[-1], names)
    with names["processes"]() as pool:  # nothing is started before there is work
        assert callable(pool.submit)


# Clusters and kills

CLUSTER = """
import dask, signal, sys, time
from distributed import LocalCluster

if __name__ == "__main__":
    dask.config.set({"distributed.scheduler.allowed-failures": 1})
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Dask scheduler and two workers, one thread each, which know the tests' own modules."""
    script = tmp_path_factory.mktemp("cluster") / "cluster.py"
    script.write_text(CLUSTER)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=script.parent,  # not where studies are
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield process.stdout.readline().strip(), process.pid
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


def started(folder: Path, *words: str) -> subprocess.Popen:
    """The grid, in a folder seen from its parent."""
    return subprocess.Popen(
        [sys.executable, "-m", "small_grid", folder.name, *words],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_workers(of: int) -> None:
    for child in psutil.Process(of).children(recursive=True):
        if any("spawn_main" in word for word in child.cmdline()):
            child.send_signal(signal.SIGKILL)


def wait_for_an_epoch(folder: Path, process: subprocess.Popen) -> None:
    while not list(folder.glob("models/*/checkpoints/resume*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def check_equal(found: Path, expected: Path) -> None:
    assert (found / "rows.json").read_bytes() == (expected / "rows.json").read_bytes()
    for path in expected.glob("models/*/checkpoints/*.safetensors"):
        assert (found / path.relative_to(expected)).read_bytes() == path.read_bytes()


def check_trained_once(folder: Path) -> None:
    models = list((folder / "models").iterdir())
    assert len(models) == 4
    for model in models:
        assert len((model / "metrics.jsonl").read_text().splitlines()) == 3
        assert (folder / "logs" / f"{model.name}.log").read_text().count("at, seed 0: 60 images") == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The grid, one model after the other in this process."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    small_grid.write({name: rows(task) for name, task in small_grid.grid(folder).items()}, folder)
    return folder


@pytest.mark.slow
def test_jobs_that_are_no_futures_make_equal_numbers(whole, tmp_path):
    """An executor by name, whose results come as submitit's do."""
    process = started(tmp_path / "study", "0", "working:jobs")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "4/4" in out
    check_trained_once(tmp_path / "study")
    check_equal(tmp_path / "study", whole)


@pytest.mark.slow
def test_a_dask_cluster_makes_equal_numbers(whole, cluster, tmp_path):
    process = started(tmp_path / "study", "0", cluster[0])
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert f"2 Dask workers at {cluster[0]}" in out
    check_trained_once(tmp_path / "study")
    check_equal(tmp_path / "study", whole)


@pytest.mark.slow
def test_dask_workers_that_are_killed_are_replaced_and_numbers_are_equal(whole, cluster, tmp_path):
    process = started(tmp_path / "study", "0", cluster[0])
    wait_for_an_epoch(tmp_path / "study", process)
    kill_workers(cluster[1])
    _, err = process.communicate()
    assert process.returncode == 0, err
    check_equal(tmp_path / "study", whole)


@pytest.mark.slow
def test_a_local_worker_that_is_killed_ends_the_study_and_the_same_command_goes_on(whole, tmp_path):
    process = started(tmp_path / "study", "1")
    wait_for_an_epoch(tmp_path / "study", process)
    kill_workers(process.pid)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "OSError: a worker ended without a word" in err.splitlines()[-1]
    assert not (tmp_path / "study" / "rows.json").exists()
    again = started(tmp_path / "study", "2")
    _, err = again.communicate()
    assert again.returncode == 0, err
    check_equal(tmp_path / "study", whole)


@pytest.mark.slow
def test_work_that_kills_every_dask_worker_is_one_line_and_what_is_finished_is_kept(cluster, tmp_path):
    script = (
        "import sys, working; from pathlib import Path\n"
        "from saltflat.lab.study import executors; from saltflat.lab.study.workers import side_by_side\n"
        "with executors.named(sys.argv[1], 0, 'cpu')() as pool:\n"
        "    side_by_side(working.killed_but_first, {'a': 0, 'b': 1}, pool, Path('logs'), str)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, cluster[0]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert re.search(r"OSError: a worker ended without a word at b \(KilledWorker: ", process.stderr.splitlines()[-1])
    assert (tmp_path / "logs" / "a.log").read_text() == "finished\n"
    assert "1/2  a: 0" in process.stdout
