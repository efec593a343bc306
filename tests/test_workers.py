"""Models side by side: order, threads, faults, and that nobody works on when the study is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import working

from saltflat.lab.config import Interrupted
from saltflat.lab.study.workers import processes, side_by_side


def test_results_come_by_name_in_the_order_given_and_prints_go_to_logs(tmp_path, capsys):
    with processes(2) as pool:
        found = side_by_side(working.squared, {"b": 3, "a": 2, "c": 4}, pool, tmp_path / "logs", lambda n: f"got {n}")
    assert list(found.items()) == [("b", 9), ("a", 4), ("c", 16)]
    assert (tmp_path / "logs" / "b.log").read_text() == "squaring 3\n"
    out = capsys.readouterr().out
    assert "3/3" in out
    assert "a: got 4" in out
    assert "squaring" not in out


def test_a_worker_has_one_thread_and_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what it would begin with
    with processes(2) as pool:
        found = side_by_side(working.threads, {"a": 0, "b": 1}, pool, tmp_path, str)
    assert {threads for threads, _ in found.values()} == {1}
    assert os.getpid() not in {process for _, process in found.values()}


def test_what_a_worker_raises_stops_the_others_and_is_raised(tmp_path):
    began = time.monotonic()
    with pytest.raises(ValueError, match="expected anything but 1"), processes(2) as pool:
        side_by_side(working.refused, {"a": 0, "b": 1}, pool, tmp_path, str)
    assert time.monotonic() - began < 40


def test_a_worker_that_is_killed_is_one_line(tmp_path):
    with pytest.raises(OSError, match=r"a worker ended without a word at a .*; .*the same command goes on"):
        with processes(1) as pool:
            side_by_side(working.killed, {"a": 0}, pool, tmp_path, str)


def test_a_study_that_is_told_to_stop_says_how_to_go_on(tmp_path, capsys):
    before, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(Interrupted), processes(1) as pool:
        side_by_side(working.telling, {"a": 0, "b": 1}, pool, tmp_path, str)
    assert "told to stop; the same command goes on from what is there" in capsys.readouterr().out
    assert time.monotonic() - began < 40
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_without_the_study_nobody_works_on(tmp_path, by):
    script = (
        "import working; from pathlib import Path; from saltflat.lab.study.workers import processes, side_by_side\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    with processes(1) as pool:\n"
        "        side_by_side(working.marked, {'a': folder}, pool, folder / 'logs', str)\n"
    )
    (tmp_path / "script.py").write_text(script)
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it

    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], env=here, stderr=subprocess.DEVNULL, preexec_fn=listen
    )
    mark = tmp_path / "mark"
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(by)
    process.wait(timeout=30)
    time.sleep(2.0)
    last = mark.read_text()
    time.sleep(1.0)
    assert mark.read_text() == last
