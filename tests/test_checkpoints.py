"""Checkpoints: two are kept, and what is damaged is told, set aside or refused, never used."""

import errno
import os

import pytest
import torch
from damaged import damages, read_or_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import equal_states, state
from safetensors.torch import save_file
from torch import nn

from saltflat.lab import checkpoints
from saltflat.lab.checkpoints import load_weights, newest_whole, save_state, save_weights, states
from saltflat.lab.config import BadInput


def of_step(step):
    torch.manual_seed(step)
    ranks = [{"random": torch.get_rng_state(), "random_cuda": None, "memory": {}, "sums": None}]
    kept = {"model": nn.Linear(3, 2).state_dict(), "optimizer": {}, "average": None, "ranks": ranks, "within": None}
    return kept | {"step": step, "epoch": 0, "best": 0.5, "before": 0.5, "in_a_row": 0, "config": "", "metrics": []}


def steps(folder):
    return [int(path.name.split("-")[1]) for path in states(folder)]


def test_the_two_of_most_steps_are_kept_whatever_the_clock_says(tmp_path):
    for time, step in enumerate((1, 9, 10, 11)):
        path = save_state(tmp_path, of_step(step))
        os.utime(path, (1_000_000 - time, 1_000_000 - time))  # a clock that goes back
        assert path == states(tmp_path)[0]
    assert steps(tmp_path) == [11, 10]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in states(tmp_path)}
    found, state = newest_whole(tmp_path, pytest.fail)
    assert (found, state["step"]) == (path, 11)


def test_what_is_no_checkpoint_is_neither_read_nor_removed(tmp_path):
    others = ["resume.pt", "resume-1.pt", "resume-x-0123456789abcdef.pt", "last.safetensors", "damaged-resume-3-0.pt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    assert newest_whole(tmp_path, pytest.fail) is None
    for step in range(4):
        save_state(tmp_path, of_step(step))
    assert steps(tmp_path) == [3, 2]
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_what_a_killed_process_had_not_finished_does_not_pile_up(tmp_path):
    (tmp_path / ".resume-7-0123456789abcdef.pt.new").write_text("half of it")
    path = save_state(tmp_path, of_step(8))
    assert list(tmp_path.iterdir()) == [path]


BOTH = [(0, 12), (1, 12), (2, 12)]


@pytest.mark.parametrize(("seed", "number"), BOTH)
def test_a_damaged_newest_one_is_told_and_set_aside_and_the_one_before_is_used(seed, number, tmp_path):
    before, newest = save_state(tmp_path, of_step(1)), save_state(tmp_path, of_step(2))
    whole = newest.read_bytes()
    done = 0
    for how, content in damages(whole, number, seed):
        if content == whole:
            continue
        newest.write_bytes(content)
        told = []
        path, state = newest_whole(tmp_path, told.append)
        assert (path, state["step"]) == (before, 1), how
        (line,) = told
        assert line == (
            f"{newest} is damaged: set aside as damaged-{newest.name}; what was saved before it is tried next"
        )
        assert not newest.exists()
        assert (tmp_path / f"damaged-{newest.name}").read_bytes() == content
        done += 1
    assert done > 8 * number


@given(st.data())
@settings(deadline=None)  # it flushes to the disk
def test_every_bit_counts(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("states")
    path = save_state(folder, of_step(1))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    told = []
    assert newest_whole(folder, told.append) is None
    assert len(told) == 1


def test_where_both_are_damaged_there_is_none(tmp_path):
    paths = [save_state(tmp_path, of_step(step)) for step in (1, 2)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    told = []
    assert newest_whole(tmp_path, told.append) is None
    assert [line.split(" is damaged")[0] for line in told] == [str(path) for path in reversed(paths)]
    assert not states(tmp_path)
    assert newest_whole(tmp_path, pytest.fail) is None  # and nothing is told again


def test_another_content_under_the_same_name_is_not_taken(tmp_path):
    one, other = save_state(tmp_path, of_step(1)), save_state(tmp_path, of_step(2))
    other.write_bytes(one.read_bytes())
    told = []
    assert newest_whole(tmp_path, told.append)[0] == one
    assert len(told) == 1


@pytest.mark.parametrize("place", ["write", "fsync", "replace"])
def test_a_disk_that_is_full_leaves_what_was_there(place, tmp_path, monkeypatch):
    kept = [save_state(tmp_path, of_step(step)) for step in (1, 2)]
    before = {path: path.read_bytes() for path in kept}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*{
        "write": ("pathlib.Path.write_bytes", full),
        "fsync": ("os.fsync", full),
        "replace": ("pathlib.Path.replace", full),
    }[place])  # fmt: skip
    with pytest.raises(OSError, match="No space left on device"):
        save_state(tmp_path, of_step(3))
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_every_byte_of_weights_counts(tmp_path):
    """The header's length, names, types, shapes, digest, and the numbers: refused in one line, or equal."""
    path, model = tmp_path / "w.safetensors", network()
    save_weights(path, model)
    whole, expected = path.read_bytes(), state(model)
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = []
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 1 << (at * 5 % 8)
        path.write_bytes(content)
        other = network()
        before = state(other)
        line = read_or_refused(lambda path, other=other: load_weights(path, other), path)
        if line is not None:
            refused.append(at)
        assert equal_states(state(other), expected if line is None else before), at
    assert set(range(header, len(whole))) <= set(refused)
    assert len(refused) >= len(whole) - 8  # the header ends in spaces, which may be other white space


def test_damaged_weights_are_refused(tmp_path):
    path, model = tmp_path / "w.safetensors", network()
    save_weights(path, model)
    whole = path.read_bytes()
    for how, content in damages(whole, 25, 0):
        path.write_bytes(content)
        if content == whole:
            continue
        with pytest.raises(BadInput, match=r"w\.safetensors") as error:
            load_weights(path, network())
        assert "\n" not in str(error.value), how


@pytest.mark.parametrize(
    "header", [None, {"format": "pt"}, {"format": "pt", "license": "mit"}, {"sha256": "of something else"}]
)
def test_weights_of_others_need_no_digest(header, tmp_path):
    path, model = tmp_path / "theirs.safetensors", network()
    save_file(state(model), path, header)
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    load_weights(path, other)
    assert equal_states(state(other), state(model))


def test_weights_under_a_digest_of_others_are_refused(tmp_path):
    path, model = tmp_path / "w.safetensors", network()
    save_weights(path, model)
    with checkpoints.safe_open(path, "pt") as file:
        header = file.metadata()
    changed = {name: tensor + (name == "0.bias") for name, tensor in state(model).items()}
    save_file(changed, path, header)
    with pytest.raises(BadInput, match="is damaged: its numbers are not those that were written"):
        load_weights(path, model)


def test_equal_weights_make_equal_files(tmp_path):
    for name in ("one", "other"):
        save_weights(tmp_path / name, network())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
