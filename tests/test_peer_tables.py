"""Peers are counted, held against closed forms, read and shown as it is said: on ours and on toys, without a peer."""

import doctest
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peer_tables
from benchmarks.peers import breakage, counting, curvature, directions, perturbing, reading, training
from benchmarks.peers.breakage import outcome
from benchmarks.peers.counting import observed, the_same
from benchmarks.peers.stand_ins import images, mocked, network, without_cuda

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "records" / "2026-11-26_peers" / "peers.json"
NOWHERE = Path()


# --- counting ---


def a_step(model, optimizer, x, y):
    """Two and a half forwards, two backwards, one of them with weight gradients; statistics twice."""
    with torch.no_grad():
        model.eval()(x[: len(x) // 2])
    attacked = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model.train()(attacked), y), attacked)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_a_step_is_counted_at_the_network():
    model = network()
    optimizer = training.sgd(model)
    with observed(model, batch_size=4) as steps:
        for seed in range(3):
            a_step(model, optimizer, *images(4, seed))
    assert the_same(steps) == {"forwards": 2.5, "backwards": 2.0, "weight gradients": 1.0, "statistics": 2.0}
    assert len(steps) == 2


def test_a_second_network_counts_but_its_optimiser_ends_no_step():
    model, twin = network(0), network(1)
    optimizer, other = training.sgd(model), training.sgd(twin)
    with observed(model, batch_size=4) as steps:
        for seed in range(2):
            x, y = images(4, seed)
            F.cross_entropy(twin(x), y).backward()
            other.step()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert steps == [{"forwards": 2.0, "backwards": 2.0, "weight gradients": 2.0, "statistics": 1.0}]


def test_nothing_is_counted_after_the_block():
    model = network()
    optimizer = training.sgd(model)
    with observed(model, batch_size=4) as steps:
        a_step(model, optimizer, *images(4))
    a_step(model, optimizer, *images(4))
    assert steps == []
    with pytest.raises(ValueError, match="alike"):
        the_same(steps)


@pytest.mark.parametrize(
    ("method", "forwards", "backwards", "weight_gradients", "statistics"),
    [
        ("AT", 11, 11, 1, 1),
        ("AT-AWP", 12, 12, 2, 1),
        ("TRADES", 13, 12, 2, 2),
        ("TRADES-AWP", 15, 14, 4, 2),
        ("MART-AWP", 14, 14, 4, 2),
    ],
)
def test_what_a_step_of_ours_costs(method, forwards, backwards, weight_gradients, statistics):
    model = network()
    with observed(model, training.BATCH) as steps:
        training.TRAINERS["Saltflat"][method](NOWHERE, model, network(1), *images(3 * training.BATCH))
    names = ("forwards", "backwards", "weight gradients", "statistics")
    assert the_same(steps) == dict(zip(names, (forwards, backwards, weight_gradients, statistics), strict=True))


# --- weight perturbations ---


def test_ours_is_the_closed_form_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(perturbing, "CYCLES", 20)
    found = perturbing.measured(NOWHERE, perturbing.saltflat)
    assert found["error"] < 2e-5
    assert (found["tensors"], found["one-dimensional"], found["statistics"]) == (3, 0, 0)
    assert (found["drift"], found["weights that drifted"], found["not finite"]) == (0, 0, 0)
    assert not found["parallel to g"]


def careless(source, model, twin):
    """v along the whole gradient, of all weights, with the model's own statistics; added, then subtracted."""

    @contextmanager
    def climb(x, y):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        v = {name: 0.1 * p.grad.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(v[name])
            yield v
            for name, p in model.named_parameters():
                p.sub_(v[name])

    return climb


def test_a_careless_perturbation_is_found_out(monkeypatch):
    monkeypatch.setattr(perturbing, "CYCLES", 20)
    found = perturbing.measured(NOWHERE, careless)
    assert found["error"] > 0.01
    assert found["largest size"] > 1.01 * found["smallest size"]
    assert found["one-dimensional"] > 0
    assert found["statistics"] == 1
    assert found["drift"] > 0 < found["weights that drifted"]
    assert found["not finite"] > 0.5
    assert found["parallel to g"]


# --- Hessians and directions ---


def test_the_dense_hessian_is_that_of_the_loss():
    model, x, y = curvature.subject()
    matrix = curvature.dense(model, x, y)
    assert matrix.shape == (267, 267)
    assert torch.allclose(matrix, matrix.T)
    model.double()
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def slope(at):
        torch.nn.utils.vector_to_parameters(at, model.parameters())
        found = torch.autograd.grad(F.cross_entropy(model(x.double()), y), list(model.parameters()))
        return torch.cat([g.flatten() for g in found])

    v = torch.randn(267, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = (slope(weights + 1e-5 * v) - slope(weights - 1e-5 * v)) / 2e-5
    assert torch.allclose(matrix @ v, difference, rtol=1e-5, atol=1e-7)


def test_errors_over_seeds():
    found = curvature.over_seeds(lambda seed: (1.0 + seed, 10 + seed), exact=1.0)
    assert found == {"median error": 9.0, "worst error": 19.0, "fewest products": 10, "most products": 29}


def test_directions_are_held_against_filters():
    model = network()
    exact = [p.detach().clone() for p in model.parameters()]
    assert directions.held(model, exact) == {"error": 0.0, "biases and norm layers move": True}
    exact[0][0] *= 1.5
    assert directions.held(model, exact)["error"] == pytest.approx(0.5)
    ours = directions.saltflat()
    assert ours["error"] < 1e-6
    assert not ours["biases and norm layers move"]


# --- what peers want, and what was read ---


def test_stand_ins_go_away():
    before = set(sys.modules)
    tensor = torch.zeros(1)
    with mocked("torchvision"), without_cuda():
        import torchvision.datasets

        assert torchvision.datasets.CIFAR10() is not None
        assert tensor.cuda() is tensor
        assert nn.Linear(1, 1).cuda() is not None
    assert {name for name in set(sys.modules) - before if "torchvision" in name} == set()
    assert torch.Tensor.cuda.__name__ == "cuda"


def test_outcomes_are_told_in_a_line():
    def fails(source):
        raise RuntimeError("at \x1b[1m<object at 0x7f00>\x1b[0m\nand so on")

    assert outcome(fails, NOWHERE) == "RuntimeError: at <object>"
    assert outcome(lambda source: None, NOWHERE) == "runs"


def fact(**given):
    return {"peer": "someone/thing", "row": "AWP", "says": "yes", **given}


def test_a_fact_leads_to_its_line_and_goes_stale(tmp_path):
    (tmp_path / "a.py").write_text("import torch\n\ndef perturb():\n    ...\n")
    found = reading.checked(fact(path="a.py", word="def perturb"), tmp_path, "c0ffee")
    assert found.link == "https://github.com/someone/thing/blob/c0ffee/a.py#L3"
    with pytest.raises(ValueError, match=r"someone/thing, AWP: expected 'def climb' in a\.py"):
        reading.checked(fact(path="a.py", word="def climb"), tmp_path, "c0ffee")
    assert reading.checked(fact(absent=["autocast"]), tmp_path, "c0ffee").how == "no autocast in any Python file"
    with pytest.raises(ValueError, match="expected 'torch' in no file"):
        reading.checked(fact(absent=["torch"]), tmp_path, "c0ffee")


ALL = reading.tomllib.loads(reading.FILE.read_text())["fact"]


def test_every_fact_has_its_place_once():
    shown = {*peer_tables.TRAINING, *peer_tables.EVALUATION, *peer_tables.MEASURES}
    assert {each["row"] for each in ALL} == shown
    assert {each["peer"] for each in ALL} <= set(reading.peers())
    places = [(each["peer"], each["row"]) for each in ALL]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("given", [each for each in ALL if each["peer"] == "Saltflat"], ids=lambda each: each["row"])
def test_what_is_said_of_ours_stands_there(given):
    reading.checked(given, ROOT, "")


# --- tables ---


def test_the_parts_are_the_whole():
    parts = [peer_tables.markdown(RECORD, part) for part in peer_tables.PARTS]
    assert peer_tables.markdown(RECORD) == "\n\n".join(parts)
    with pytest.raises(ValueError, match="part: expected features, cost, correctness, or nothing, got 'speed'"):
        peer_tables.markdown(RECORD, "speed")


def test_every_row_has_every_column():
    for block in peer_tables.markdown(RECORD).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count(" | ") for line in block.splitlines()}) == 1, block


def test_links_to_our_own_files_lead_somewhere():
    found = json.loads(RECORD.read_text())
    for each in found["read"]:
        assert each["link"].startswith("https://github.com/") or (ROOT / each["link"]).exists(), each
    assert "](../../src/" in peer_tables.markdown(RECORD, "features", root="../..")


def test_the_record_holds_everything_that_is_measured():
    found = json.loads(RECORD.read_text())
    assert set(found["steps"]) == set(training.TRAINERS)
    assert {peer: set(by_name) for peer, by_name in found["climbs"].items()} == {
        peer: set(by_name) for peer, by_name in perturbing.CLIMBS.items()
    }
    assert {each["row"] for each in found["read"]} == {each["row"] for each in ALL}
    assert len({len(of) for by_name in found["verdicts"].values() for of in by_name.values()}) == 1


def test_what_awp_adds_is_told_of_the_same_code():
    counts = {"forwards": 10, "backwards": 10, "weight gradients": 0, "statistics": 1}
    twice = {**counts, "weight gradients": 20}
    assert peer_tables._added({"AT": counts, "AT-AWP": twice}, "AT-AWP") == "100%"
    assert peer_tables._added({"AT-AWP": twice}, "AT-AWP") == ""
    assert math.isclose(peer_tables.passes(twice), 40)


@pytest.mark.parametrize("module", [peer_tables, breakage, counting, perturbing], ids=lambda module: module.__name__)
def test_examples_hold(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
