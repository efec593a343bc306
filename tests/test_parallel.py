"""What ranks tell each other, how weights lie on them, and what becomes of one whose neighbour is gone."""

import copy
import re
import socket
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import batch, convolutional, equal_states, state
from ranks import found, gone, started, stopped
from torch import distributed, nn

from saltflat import AT, Layerwise, double_perturbation_step, parallel, perturbed
from saltflat.neighbours.accumulated import accumulated_step, cheaply_accumulated_step
from saltflat.neighbours.adaptive_random_wp import adaptively_drawn
from saltflat.neighbours.random_wp import Gaussian
from saltflat.parallel import Alone, RankLost, Replicated, Sharded, Weighted
from saltflat.step import dropping
from saltflat.weights import trained

BALL = Layerwise(0.05)
SPREADS = {
    "alone": Alone,
    "replicated": Replicated,
    "sharded": lambda model: Sharded(model, lambda model: [model[0], model[3]]),
}


# Without torchrun


def test_one_process_talks_to_itself():
    assert (parallel.rank(), parallel.ranks(), parallel.launched()) == (0, 1, False)
    assert parallel.everyones("a") == ["a"]
    assert parallel.first(lambda: 3) == 3
    assert [parallel.anyones(value) for value in (True, False)] == [True, False]
    rows = torch.arange(3.0)
    assert parallel.mean(rows) is rows
    assert torch.equal(parallel.joined(rows), rows)
    assert parallel.shared_out("abc", str.upper) == ["A", "B", "C"]
    model = convolutional()
    before = state(model)
    parallel.same_buffers(model)
    assert equal_states(before, state(model))
    with pytest.raises(ZeroDivisionError):
        parallel.first(lambda: 1 // 0)
    with parallel.together():
        assert parallel.ranks() == 1
        assert not distributed.is_initialized()


@given(n=st.integers(0, 300), ranks=st.integers(1, 17))
def test_shares_are_all_rows_in_order(n, ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "ranks", lambda: ranks)
        shares = []
        for rank in range(ranks):
            patch.setattr(parallel, "rank", partial(int, rank))
            shares.append(range(n)[parallel.share(n)])
    assert [row for rows in shares for row in rows] == [*range(n)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(n=st.integers(0, 40), ranks=st.integers(1, 9))
def test_what_is_shared_out_comes_back_in_order(n, ranks):
    """Each rank is asked in turn, then one hears of what all have found: every item once, whoever does it, in order."""
    done, parts = [], []

    class Heard(Exception):
        pass

    def keep(own):
        parts.append(own)
        raise Heard

    def work(item):
        done.append(item)
        return 10 * item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "ranks", lambda: ranks)
        patch.setattr(parallel, "_talk", ["a group"])
        patch.setattr(parallel, "everyones", keep)
        for rank in range(ranks):
            patch.setattr(parallel, "rank", partial(int, rank))
            with pytest.raises(Heard):
                parallel.shared_out(range(n), work)
        assert sorted(done) == [*range(n)]
        patch.setattr(parallel, "everyones", lambda own: parts)
        assert parallel.shared_out(range(n), work) == [10 * i for i in range(n)]


def test_what_else_is_climbed_is_weighted_as_the_objective_is():
    loss = lambda x: 3 * x
    assert parallel.weighted(loss, Weighted(AT(), 0.5))(2.0) == 3.0
    assert parallel.weighted(loss, AT()) is loss


def test_a_module_that_has_a_reshard_of_its_own_is_not_asked_to():
    class Own(nn.Linear):
        def reshard(self):
            raise AssertionError("nobody's business")

    __import__("torch.distributed.fsdp")
    parallel.reshard(nn.Sequential(Own(2, 2)))


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "RANK"])
def test_variables_that_do_not_say_where_the_others_are_are_told_of_in_a_line(missing, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(RankLost, match=rf"^WORLD_SIZE is set, but {missing} not: expected torchrun [^\n]*$"):
        with parallel.together():
            pass
    assert not distributed.is_initialized()


def test_a_weighted_objective_is_the_objective_but_for_its_outer_loss():
    model, (x, y) = convolutional().eval(), batch()
    weighted = Weighted(AT(), 0.5)
    assert torch.equal(weighted.outer(model, x, x, y), 0.5 * AT().outer(model, x, x, y))
    assert torch.equal(weighted.inner(model, x, y)(x), AT().inner(model, x, y)(x))
    assert torch.equal(weighted.each(model, x, x, y), AT().each(model, x, x, y))


def test_other_shards_are_refused_where_weights_are_chosen():
    """A stand-in for ZeRO-3, which marks its weights so."""
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"^model: ZeRO-3 holds no weights between forwards"):
        with perturbed(model, lambda: model(torch.ones(2)).sum(), BALL):
            pass
    with pytest.raises(ValueError, match="ZeRO-3"):
        parallel.refuse_others(nn.Sequential(model))
    parallel.refuse_others(convolutional())


def test_synchronised_statistics_are_refused_on_cpus():
    with pytest.raises(
        ValueError, match=r"^sync_batch_norm: expected False on CPUs: SyncBatchNorm runs on GPUs alone$"
    ):
        Replicated(convolutional(), sync_batch_norm=True)


# One process with a group of its own


@pytest.fixture
def group(tmp_path):
    with parallel.together(init_method=f"file://{tmp_path}/meet", rank=0, world_size=1):
        yield


@pytest.mark.usefixtures("group")
def test_fsdp1_is_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(2, 2)), device_id=torch.device("cpu"), use_orig_params=True
        )
    with pytest.raises(ValueError, match=r"^model: FSDP1 flattens weights") as refused:
        parallel.refuse_others(model)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="FSDP1"), perturbed(model, lambda: model(torch.ones(1, 2)).sum(), BALL):
        pass


@pytest.mark.usefixtures("group")
def test_an_ascent_per_rank_needs_replicas_and_the_step_outside():
    model, (x, y) = convolutional(), batch()
    loss = lambda: AT().outer(model, x, x, y)
    with pytest.raises(ValueError, match=r"^model: an ascent per rank needs DistributedDataParallel, got Sequential$"):
        with parallel.per_rank(perturbed)(model, loss, BALL):
            pass
    with pytest.raises(ValueError, match=r"^step_inside: expected False with an ascent per rank"):
        with parallel.per_rank(perturbed)(Replicated(model).called, loss, BALL, step_inside=True):
            pass


@pytest.mark.usefixtures("group")
def test_a_climb_begins_at_shards_whatever_forward_came_before():
    """FSDP2 as torch has it by default leaves the root whole after a forward without gradients."""
    from torch.distributed.fsdp import fully_shard

    (x, y), found = batch(), []
    for model in (convolutional(batch_norm=False), fully_shard(convolutional(batch_norm=False))):
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.01)
        with torch.no_grad():
            model(x)
        with perturbed(model, lambda: AT().outer(model, x, x, y), BALL) as ascent:  # noqa: B023
            found.append({name: parallel.gathered(v) for name, v in ascent.displacement.items()})
        assert all(bool((parallel.gathered(parameter) == 0.01).all()) for parameter in model.parameters())
    assert equal_states(*found)


@pytest.mark.usefixtures("group")
def test_raw_is_what_replicas_are_of():
    model = convolutional()
    called = Replicated(model).called
    assert parallel.raw(called) is model
    assert parallel.raw(model) is model
    assert parallel.on_raw(lambda found: found)(called) is model


@pytest.mark.usefixtures("group")
def test_an_optimizer_of_other_weights_is_refused():
    with pytest.raises(ValueError, match=r"^optimizer: expected the model's parameters alone, got 2 others$"):
        Alone(convolutional()).state(torch.optim.SGD(nn.Linear(2, 2).parameters()))


@pytest.mark.usefixtures("group")
def test_a_state_of_other_groups_of_weights_is_refused():
    """Their own numbers would go to the wrong weights, by their place."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    one, other = ([{"params": model[name].parameters()} for name in names] for names in ("ab", "ba"))
    optimizer = torch.optim.SGD(one, lr=0.1)
    state = Alone(model).state(optimizer)
    Alone(model).load(optimizer, state)
    with pytest.raises(ValueError, match=r"^state: expected equal groups of weights, but 'a.weight' is in another"):
        Alone(model).load(torch.optim.SGD(other, lr=0.1), state)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("step", "exchanges"), [(accumulated_step, 2), (cheaply_accumulated_step, 3 + 1)])
def test_micro_batches_exchange_gradients_once_a_pass(step, exchanges):
    """The ascent and the descent of the whole; the cheap form's every ascent, and its descent."""
    model, (x, y), exchanged = convolutional(batch_norm=False), batch(), []
    called = Replicated(model).called

    def exchange(_, bucket):
        exchanged.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    called.register_comm_hook(None, exchange)
    for _ in range(2):  # the first time tells torch in which order gradients come
        exchanged.clear()
        step(called, x, y, objective=AT(), attack=None, ball=BALL, optimizer=grouped(model), micro_batches=3)
    assert exchanged.count(0) == exchanges


@pytest.mark.parametrize("meeting", ["file", "tcp"])
def test_ranks_that_do_not_come_are_lost(tmp_path, meeting):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = {"file": f"file://{tmp_path}/meet", "tcp": f"tcp://127.0.0.1:{port}"}
    options = {"init_method": where[meeting], "rank": 0, "world_size": 2}
    with pytest.raises(RankLost, match=r"^rank 0 of 2: another process is gone, or does not answer"):
        with parallel.together(timeout=timedelta(seconds=1), **options):
            pass
    assert not distributed.is_initialized()


@pytest.mark.parametrize(
    "said",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer",
        "Application timeout caused pair closure",
        "Wait timeout",
    ],
)
def test_what_gloo_says_of_others_is_known(tmp_path, said):
    with pytest.raises(RankLost, match=r"^rank 0 of 1: another process is gone, or does not answer \("):
        with parallel.together(init_method=f"file://{tmp_path}/meet", rank=0, world_size=1):
            raise RuntimeError(said)
    assert parallel.ranks() == 1


def test_a_group_on_gpus_is_not_waited_for_after_a_failure(monkeypatch):
    """As `together` leaves it there; gloo has nothing to abort, and goes on as if it had."""
    left = []
    monkeypatch.setattr(distributed.distributed_c10d, "_abort_process_group", lambda: left.append("aborted"))
    parallel._abort()
    monkeypatch.delattr(distributed.distributed_c10d, "_abort_process_group")
    parallel._abort()
    assert left == ["aborted"]


def test_what_is_no_fault_of_ranks_passes_through(tmp_path):
    for error in (RuntimeError("shapes do not fit"), ValueError("gloo: no"), KeyError("x")):
        with pytest.raises(type(error)) as raised:
            with parallel.together(init_method=f"file://{tmp_path}/meet{id(error)}", rank=0, world_size=1):
                raise error
        assert raised.value is error
        assert not distributed.is_initialized()
        assert parallel.ranks() == 1


# Two processes


def grouped(model, make=torch.optim.SGD):
    """Two groups, the second first in the model: decay for what has more than one dimension, none for the rest."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.01}]
    return make(groups, lr=0.05, momentum=0.9) if make is torch.optim.SGD else make(groups, lr=0.01)


def network(seed=0, norm=False):
    torch.manual_seed(seed)
    return convolutional(batch_norm=norm).train()


def steps(spread, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        x, y = batch()
        rows = parallel.share(len(x))
        double_perturbation_step(
            spread.called, x[rows], y[rows], objective=AT(), attack=None, ball=BALL, optimizer=optimizer, where=trained
        )
        spread.settle()


def begun(kind, make=torch.optim.SGD):
    """The state after three steps, and the weights after three more."""
    model = network()
    spread = SPREADS[kind](model)
    optimizer = grouped(model, make)
    steps(spread, optimizer, range(3))
    kept = copy.deepcopy(spread.state(optimizer))
    steps(spread, optimizer, range(3, 6))
    return kept, state(spread.network())


def gone_on(kind, kept, make=torch.optim.SGD):
    """The weights after three more, from other weights that the state is loaded into."""
    model = network(seed=1)
    spread = SPREADS[kind](model)
    optimizer = grouped(model, make)
    spread.load(optimizer, copy.deepcopy(kept))
    steps(spread, optimizer, range(3, 6))
    return state(spread.network())


MAKERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def loaded(folder, origin, maker):
    return torch.load(folder / f"{origin}-{maker}.pt", weights_only=True)


def raised(make):
    try:
        return make()
    except Exception as error:
        return repr(error)


class Unpicklable(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def refused(one, other):
    raise Unpicklable(one, other)


def sharded():
    return SPREADS["sharded"](network().float()).called


def begun_with(kind):
    """Buffers, of a model in which each rank has filled them by itself."""
    model = network(norm=True)
    for buffer in model.buffers():
        buffer.fill_(parallel.rank() + 1)
    return {name: buffer.clone() for name, buffer in SPREADS[kind](model).called.named_buffers()}


def backward(model):
    x, y = batch()
    AT().outer(model, x.float(), x.float(), y).backward()


def poisoned(model, number):
    """One number of the gradient, on the last rank alone, whose shard it lies in."""
    if parallel.rank() == 1:
        model[3].weight.grad.to_local().view(-1)[-1] = number


def dropped(number):
    """What is dropped, and what is left of gradients."""
    model = sharded()
    drop = dropping(model, torch.optim.SGD(model.parameters()))
    backward(model)
    poisoned(model, number)
    found = int(drop())
    return found, sum(float(parallel.gathered(p.grad).abs().sum()) for p in model.parameters())


def remembered():
    """ARWP's memory, after a good batch, and after one more."""
    model, memory, found = sharded(), {}, []
    for number in (1.0, torch.nan):
        model.zero_grad()
        law = parallel.Gathered(0.01, Gaussian(0.01))
        with adaptively_drawn(model, None, law, memory=memory, generator=torch.Generator().manual_seed(0)):
            backward(model)
            poisoned(model, number)
        found.append({name: parallel.gathered(value).clone() for name, value in memory.items()})
    return found


def adding_up():
    """A torch that takes no means of shards' gradients."""

    def summed(real, *given, op=None, **named):
        return real(*given, op=distributed.ReduceOp.SUM, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # the latter is newer torch's
            if real := getattr(distributed, name, None):
                patch.setattr(distributed, name, partial(summed, real))
        sharded()


TYPES = ("int16", "uint16", "complex64", "float8_e4m3fn")


def told(folder):
    rank = parallel.rank()
    calls = []
    model = network(seed=rank, norm=True)
    model.register_buffer("flags", torch.tensor([rank == 0, True]))
    model.register_buffer("odd", torch.arange(6.0).reshape(2, 3).t() + rank)
    for name in TYPES:
        model.register_buffer(f"of torch {name}", torch.tensor([rank, 1.0]).to(getattr(torch, name)))
    parallel.same_buffers(model)
    answers = {
        "who": (rank, parallel.ranks()),
        "everyones": parallel.everyones({"rank": rank}),
        "first": parallel.first(lambda: calls.append(rank) or "made"),
        "calls": calls,
        "raised": raised(lambda: parallel.first(lambda: 1 // 0)),
        "unpicklable": raised(lambda: parallel.first(lambda: refused("one", "other"))),
        "anyones": [parallel.anyones(value) for value in (rank == 0, rank == 1, False, True)],
        "mean": parallel.mean(torch.tensor([1.0, 2.0 * rank])),
        "shared_out": parallel.shared_out(range(5), lambda n: (n, rank)),
        "joined": parallel.joined(torch.arange(7)[parallel.share(7)]),
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "begun with": {kind: begun_with(kind) for kind in ("replicated", "sharded")},
        "dropped": dropped(torch.nan),
        "kept": dropped(1.0),
        "remembered": remembered(),
        "own": parallel.gathered(parallel._laid(torch.full((4,), float(rank)), sharded()[0].bias)),
        "averages": raised(adding_up),
        "device": sharded()[0].bias.device_mesh.device_type,
    }
    spreads = ("replicated", "sharded")
    for maker, make in MAKERS.items():
        for kind in spreads:
            kept, answers["whole", kind, maker] = begun(kind, make)
            answers["kept", kind, maker] = kept
            parallel.first(partial(torch.save, kept, folder / f"{kind}-{maker}.pt"))
        for origin in SPREADS:
            for kind in spreads:
                answers[origin, kind, maker] = gone_on(kind, loaded(folder, origin, maker), make)
    for kind in spreads:
        answers["fused", kind] = gone_on(kind, torch.load(folder / "fused.pt", weights_only=True))
    normed = network(norm=True)
    spread = Replicated(normed)
    steps(spread, grouped(normed), range(2))
    answers["settled"] = state(spread.network())
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(folder):
    whole = {}
    for maker, make in MAKERS.items():
        kept, whole[maker] = begun("alone", make)
        torch.save(kept, folder / f"alone-{maker}.pt")
    kept, whole["fused"] = begun("alone", partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True))
    torch.save(kept, folder / "fused.pt")
    return whole


@pytest.fixture(scope="module")
def both(alone, folder):
    return found(told, folder)


@pytest.mark.slow
def test_ranks_tell_each_other(both):
    one, other = both
    assert (one["who"], other["who"]) == ((0, 2), (1, 2))
    assert (one["calls"], other["calls"]) == ([0], [])
    assert torch.equal(one["joined"], torch.arange(7))
    assert torch.equal(one["mean"], torch.tensor([1.0, 1.0]))
    for answers in both:
        assert answers["everyones"] == [{"rank": 0}, {"rank": 1}]
        assert answers["first"] == "made"
        assert answers["raised"] == repr(ZeroDivisionError("integer division or modulo by zero"))
        assert "one and other" in answers["unpicklable"]
        assert answers["anyones"] == [True, True, False, True]
        assert answers["shared_out"] == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    expected = dict(network(seed=0, norm=True).named_buffers())
    expected |= {"flags": torch.tensor([True, True]), "odd": torch.arange(6.0).reshape(2, 3).t()}
    expected |= {f"of torch {name}": torch.tensor([0.0, 1.0]).to(getattr(torch, name)) for name in TYPES}
    for answers in both:
        assert equal_states(answers["buffers"], expected)
    assert equal_states(one["settled"], other["settled"])
    assert not torch.equal(one["settled"]["1.running_mean"], torch.zeros(4, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("origin", SPREADS)
def test_any_spread_goes_on_from_any_other(both, alone, folder, origin, kind, maker):
    """From a file that holds no pickled code, on two ranks or one; to the bit where nothing but the process is new."""
    tolerance = 1e-12 if maker == "sgd" else 1e-10  # Adam divides by the root of what may be next to nothing
    if kind == "alone":
        went = [gone_on("alone", loaded(folder, origin, maker), MAKERS[maker])]
    else:
        went = [answers[origin, kind, maker] for answers in both]
        assert equal_states(*went)
    if origin == kind:
        assert equal_states(went[0], alone[maker] if kind == "alone" else both[0]["whole", kind, maker])
    for name, tensor in alone[maker].items():
        torch.testing.assert_close(went[0][name], tensor, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_fused_optimizer_s_state_goes_on_where_there_is_none(both, alone, kind):
    """torch has no fused kernel for shards: how steps are computed is the optimiser's own."""
    for name, tensor in alone["fused"].items():
        torch.testing.assert_close(both[0]["fused", kind][name], tensor, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_buffers_are_the_first_rank_s_from_the_beginning(both, kind):
    for answers in both:
        assert answers["begun with"][kind]
        assert all(bool((buffer == 1).all()) for buffer in answers["begun with"][kind].values())


@pytest.mark.slow
def test_a_number_that_is_not_finite_in_a_later_rank_s_shard_drops_the_batch(both):
    for answers in both:
        assert answers["dropped"] == (1, 0.0)
        assert answers["kept"][0] == 0
        assert answers["kept"][1] > 0
        before, after = answers["remembered"]
        assert equal_states(before, after)
        assert before["squared_gradients.3.weight"].any()


@pytest.mark.slow
def test_shards_are_cut_from_what_each_rank_has_on_the_model_s_device(both):
    for answers in both:
        assert answers["own"].tolist() == [0.0, 0.0, 1.0, 1.0]
        assert answers["device"] == "cpu"


@pytest.mark.slow
def test_a_torch_that_adds_gradients_of_shards_up_is_refused(both):
    said = "torch: FSDP2 on CPUs needs a release that averages gradients over ranks, got 1 as 2"
    assert [answers["averages"] for answers in both] == [repr(RuntimeError(said))] * 2


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_states_look_alike(both, alone, folder, kind, maker):
    """By the weights' names, in tensors that are whole, the optimiser's own numbers included."""

    def shape(value):
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [shape(inner) for inner in value]
        return (type(value), value.shape, value.dtype) if isinstance(value, torch.Tensor) else value

    assert shape(both[0]["kept", kind, maker]) == shape(loaded(folder, "alone", maker))
    assert "3.weight" in both[0]["kept", kind, maker]["optimizer"]["state"]


# One of them is lost


@contextmanager
def noted(path):
    try:
        yield
    except RankLost as lost:
        path.write_text(f"{time.time()}\n{lost}")
    else:
        path.write_text(f"{time.time()}\nnothing was raised")


def interrupted(rank, ranks, folder, case, seconds):
    """Steps without end, in the fourth of which rank 1 is gone, in the midst of its descent."""
    torch.set_num_threads(1)
    kind, end, at = case
    calls = 0

    class Interrupted(AT):
        def outer(self, model, x, x_adv, y):
            nonlocal calls
            calls += 1
            if rank == 1 and calls == 8 and at == "forward":
                Path(folder, "left").write_text(str(time.time()))
                end()
            value = super().outer(model, x, x_adv, y)
            if rank == 1 and calls == 8 and at == "backward":
                Path(folder, "left").write_text(str(time.time()))
                end()
            return value

    options = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": ranks}
    with noted(Path(folder, f"{rank}.txt")):
        with parallel.together(timeout=timedelta(seconds=seconds), **options):
            model = network()
            spread = SPREADS[kind](model)
            optimizer = grouped(model)
            x, y = batch()
            while True:
                double_perturbation_step(
                    spread.called, x, y, objective=Interrupted(), attack=None, ball=BALL, optimizer=optimizer
                )


ENDS = {
    "replicated, killed": ("replicated", gone, "backward", 120),
    "sharded, stopped": ("sharded", stopped, "forward", 5),
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What the first rank was told, and how many seconds after the other was gone; all pairs side by side."""
    pairs = {}
    for name, case in ENDS.items():
        folder = tmp_path_factory.mktemp("lost")
        pairs[name] = folder, started(case[:3], folder, seconds=case[3], target=interrupted)
    answers = {}
    try:
        for name, (folder, (one, _)) in pairs.items():
            one.join(100)
            when, text = (folder / "0.txt").read_text().split("\n", 1) if (folder / "0.txt").exists() else ("0", "")
            answers[name] = one.exitcode, float(when) - float((folder / "left").read_text()), text
    finally:
        for _, processes in pairs.values():
            for process in processes:
                process.kill()
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_rank_that_is_lost_is_told_of_in_a_line(left, name):
    """One that is killed at once, one that has stopped when the time is up (5 seconds here)."""
    exitcode, seconds, text = left[name]
    assert exitcode == 0
    assert re.fullmatch(r"rank 0 of 2: another process is gone, or does not answer \([^\n]+\)", text)
    assert seconds < (5 if "killed" in name else 15)
