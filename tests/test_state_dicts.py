"""Weights out of files that nobody trusts: what is read, what is refused, and that nothing in them ever runs."""

import argparse
import collections
import contextlib
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import convolutional, equal_states, state
from safetensors.torch import save_file
from torch import nn

from saltflat.models.state_dicts import read_state

WEIGHTS = {"conv.weight": torch.rand(2, 3, 3, 3), "fc.bias": torch.rand(2).half(), "steps": torch.tensor(7)}


class Bomb:
    """A pickle of this makes a folder when it is read as Python reads it."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


WAYS = {"zip": torch.save, "legacy": legacy}


def refusal(path, key=None):
    """The one line that says why a file is not read."""
    with pytest.raises(ValueError) as caught:
        read_state(path, key)
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    assert line.startswith(f"{path}: ")
    assert "weights_only" not in line  # torch's advice to read the file with its code
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return line.removeprefix(f"{path}: ")


# --- what is read ---


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "net", "model_state_dict", "ema", "whatever it is"])
def test_the_only_state_dict_in_a_file_is_found(write, wrapper, tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1, momentum=0.9)
    beside = {"epoch": 7, "acc": torch.tensor(0.5), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    write({wrapper: WEIGHTS, **beside} if wrapper else WEIGHTS, tmp_path / "model.pth")
    assert equal_states(read_state(tmp_path / "model.pth"), WEIGHTS)


def test_safetensors_are_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert equal_states(read_state(str(tmp_path / "model.safetensors")), WEIGHTS)


def test_parameters_come_as_plain_tensors(tmp_path):
    torch.save({"w": nn.Parameter(torch.ones(2))}, tmp_path / "model.pt")
    (found,) = read_state(tmp_path / "model.pt").values()
    assert type(found) is torch.Tensor
    assert not found.requires_grad


def test_several_state_dicts_must_be_chosen_from(tmp_path):
    last, best = state(convolutional()), state(convolutional())
    path = tmp_path / "model.pt"
    torch.save({"last": last, "best": best, "epoch": 3}, path)
    assert refusal(path) == "key: expected one of 'last', 'best', all of which hold weights, got none"
    assert equal_states(read_state(path, "best"), best)
    assert refusal(path, "ema") == "expected weights under 'ema', there are 'last', 'best'"
    assert refusal(path, "epoch") == "expected weights under 'epoch', there are 'last', 'best'"


def test_the_empty_key_is_the_file_itself(tmp_path):
    torch.save({**WEIGHTS, "old": {"w": torch.rand(2)}}, tmp_path / "model.pt")
    assert equal_states(read_state(tmp_path / "model.pt", ""), WEIGHTS)
    assert read_state(tmp_path / "model.pt").keys() == {"w"}


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
def test_bookkeeping_beside_the_weights_is_not_looked_at(write, tmp_path):
    beside = {
        "acc": np.float64(0.5),
        "accs": np.arange(3.0),
        "names": np.array(["a", "b"]),
        "things": np.array([1, None], dtype=object),
        "args": argparse.Namespace(lr=0.1, seed=np.int64(3)),
        "counts": collections.Counter("aab"),
    }
    write({"state_dict": WEIGHTS, **beside}, tmp_path / "model.pt")
    assert equal_states(read_state(tmp_path / "model.pt"), WEIGHTS)


def test_numpy_one_wrote_other_names(tmp_path):
    legacy({"w": torch.ones(2), "acc": np.float64(0.5)}, tmp_path / "new.pt")
    old = (tmp_path / "new.pt").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    (tmp_path / "old.pt").write_bytes(old)
    assert torch.equal(read_state(tmp_path / "old.pt")["w"], torch.ones(2))


def test_a_dictionary_that_holds_itself_is_read(tmp_path):
    content = dict(WEIGHTS)
    content["self"] = content
    torch.save({"model": content}, tmp_path / "model.pt")
    assert equal_states(read_state(tmp_path / "model.pt"), WEIGHTS)


# --- code ---


HIDDEN = {
    "alone": lambda bomb: bomb,
    "beside the weights": lambda bomb: {"state_dict": WEIGHTS, "epoch": bomb},
    "among the weights": lambda bomb: {"state_dict": {**WEIGHTS, "fc.weight": bomb}},
    "as a name": lambda bomb: {"state_dict": {**WEIGHTS, bomb: torch.ones(2)}},
    "in bookkeeping": lambda bomb: {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=bomb)},
    "in an array": lambda bomb: {"state_dict": WEIGHTS, "log": np.array([bomb, None], dtype=object)},
}


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_code_in_a_file_is_never_run(write, hidden, tmp_path):
    place, path = tmp_path / "exploded", tmp_path / "model.pt"
    pickle.loads(pickle.dumps(Bomb(place)))
    place.rmdir()  # which was there: the bomb works
    write(hidden(Bomb(place)), path)
    assert refusal(path) == (
        f"refused, the pickle names '{os.mkdir.__module__}.mkdir', which is code; nothing was run. Expected tensors in "
        "plain containers, or safetensors"
    )
    refusal(path, "state_dict")
    assert not place.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "model.pt")
    assert "the pickle names 'torch.nn.modules.linear.Linear'" in refusal(tmp_path / "model.pt")


def test_a_pickle_under_another_name_is_not_run_either(tmp_path):
    for name in ("model.safetensors", "model.pkl", "model"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2))
        refusal(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_names_in_a_pickle_cannot_paint_the_terminal(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x02c\x1b[31mred\nalert\n.")
    assert r"names '\x1b[31mred.alert'" in refusal(tmp_path / "model.pt")


# --- files that are no weights ---


def test_what_is_no_file_says_so(tmp_path):
    assert refusal(tmp_path / "none.pt") == "expected a file of weights: No such file or directory"
    assert refusal(tmp_path) == "expected a file of weights: Is a directory"
    (tmp_path / "empty.pt").touch()
    assert refusal(tmp_path / "empty.pt") == "expected a file of weights, it is empty"


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("text", ["<!DOCTYPE html><html>\nquota", "version https://git-lfs", "{}", "(dp0\nVa\np1\n."])
def test_text_is_shown(text, name, tmp_path):
    (tmp_path / name).write_text(f"\n{text}\n")
    assert refusal(tmp_path / name) == f"expected a file of weights, it is text that begins with {text!r}"


def written(way, tmp_path):
    """A good file, and its path."""
    path = tmp_path / ("good.safetensors" if way == "safetensors" else "good.pt")
    if way == "safetensors":
        save_file(WEIGHTS, path)
    else:
        WAYS[way]({"state_dict": WEIGHTS}, path)
    return path, path.read_bytes()


@pytest.mark.parametrize("way", [*WAYS, "safetensors"])
def test_a_cut_file_is_refused_wherever_it_is_cut(way, tmp_path):
    path, whole = written(way, tmp_path)
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refusal(path)
    assert "not a" in refusal(path)  # cut by one byte


@pytest.mark.parametrize("way", [*WAYS, "safetensors"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(way, tmp_path, data):
    path, whole = written(way, tmp_path)
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with contextlib.suppress(ValueError):
        assert read_state(path)
        return
    refusal(path)


def test_archives_of_other_kinds_are_refused(tmp_path):
    np.savez(tmp_path / "model.npz", w=np.ones(3))
    assert "not a file of weights, or not a whole one" in refusal(tmp_path / "model.npz")
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    assert "not a file of weights, or not a whole one" in refusal(tmp_path / "model.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(WEIGHTS.keys() | {"x"}))
    assert "not a file of weights, or not a whole one" in refusal(tmp_path / "model.pkl")


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3), [torch.ones(3)], {}, 5, {"acc": torch.tensor(0.5)}, {"rng": torch.get_rng_state()},
        {"state": {0: {"momentum_buffer": torch.ones(3)}}}, {0: torch.ones(3)},
    ],
)  # fmt: skip
def test_files_without_a_state_dict_say_so(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    expected = "expected a state dict, or one state dict among its entries, there is none"
    assert refusal(tmp_path / "model.pt") == expected
    assert refusal(tmp_path / "model.pt", "net") == "expected weights under 'net', there are none at all"


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "torch.sparse_coo, torch.float32, cpu"),
        (torch.ones(3, device="meta"), "torch.strided, torch.float32, meta"),
    ],
)
def test_tensors_without_numbers_of_their_own_are_refused(tensor, kind, tmp_path):
    torch.save({"w": torch.ones(2), "v": tensor}, tmp_path / "model.pt")
    assert refusal(tmp_path / "model.pt") == f"expected plain tensors, got 'v': {kind}"


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    torch.save(WEIGHTS, tmp_path / "model.pt")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(ValueError, match=r"expected a file of weights: Permission denied"):
        read_state(tmp_path / "model.pt")
