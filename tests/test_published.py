"""Other people's checkpoints: layouts that are published, and networks that answer as they did where they come from."""

import copy
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import equal_states
from safetensors.torch import save_file
from torch import nn

from saltflat.models import (
    Normalise,
    named,
    preact_resnet18,
    published,
    small_cnn,
    small_resnet,
    vgg19_bn,
    wide_resnet,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAME = "wide-resnet-10-1"
EVERY_NAME = {
    "preact-resnet18": preact_resnet18,
    "wide-resnet-10-1": lambda *given: wide_resnet(10, 1, *given),
    "wide-resnet-16-2": lambda *given: wide_resnet(16, 2, *given),
    "vgg19-bn": vgg19_bn,
    "small-resnet-8": lambda *given: small_resnet(*given, widths=(8, 16, 32)),
    "small-cnn-4": lambda *given: small_cnn(*given, width=4, in_channels=3),
}


def trained(network):
    """With statistics, scales and offsets that are not those of the start."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
            module.num_batches_tracked.fill_(7)
    return network.eval()


def images(n=4, size=16):
    return torch.rand(n, 3, size, size)


def answers(network, x):
    with torch.no_grad():
        return network(x)


def saved(state, tmp_path, **beside):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": state, **beside} if beside else state, path)
    return path


def complaint(call, *arguments, **options):
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names ---


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_name_is_a_network(name):
    torch.manual_seed(0)
    expected = EVERY_NAME[name](7)
    torch.manual_seed(0)
    found = named(name, 7)
    assert equal_states(found.state_dict(), expected.state_dict())
    x = images(2)
    assert torch.equal(answers(found.eval(), x), answers(expected.eval(), x))


def test_in_channels_are_passed_on():
    for name in ("small-cnn-4", "small-resnet-8", "wide-resnet-10-1", "preact-resnet18", "vgg19-bn"):
        assert named(name, in_channels=1).eval()(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    "name",
    [
        "", "resnet", "preact-resnet18-10", "vgg19-bn-1", "wide-resnet", "wide-resnet-10", "wide-resnet-10-1-1",
        "wide-resnet-010-1", "wide-resnet-10-0", "wide-resnet-10-1.5", "wide-resnet-1000-1", "small-cnn", "small-cnn-",
        "-", "10", "WIDE-resnet-10-1", " wide-resnet-10-1", "wide-resnet-10-1\n", "vgg19-bn\nx",
    ],
)  # fmt: skip
def test_a_name_of_nothing_is_refused(name):
    expected = (
        "network: expected preact-resnet18, wide-resnet-DEPTH-WIDEN (such as wide-resnet-34-10), vgg19-bn, "
        f"small-resnet-WIDTH, small-cnn-WIDTH or module:factory, got {name!r}"
    )
    assert complaint(named, name) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"in_channels": -1}, "in_channels: expected at least 1, got -1"),
        ({"mean": MEAN}, "mean and std go together: give both or neither"),
        ({"mean": MEAN, "std": (0.1, 0.0, 0.1)}, "std must be positive, got (0.1, 0.0, 0.1)"),
        (
            {"mean": (0.5, 0.5), "std": (0.1, 0.1)},
            "mean, std: expected one value, or one for each of 3 channels, got (0.5, 0.5) and (0.1, 0.1)",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    assert complaint(named, NAME, **options) == message


def test_a_depth_that_cannot_be_is_refused():
    assert complaint(named, "wide-resnet-35-10") == "depth must be 6n + 4 (10, 16, 22, 28, 34, ...), got 35"


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_mean_and_std_stand_before_the_network(name):
    torch.manual_seed(0)
    plain = named(name).eval()
    torch.manual_seed(0)
    normalising = named(name, mean=MEAN, std=STD).eval()
    x = images(2)
    outside = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(answers(normalising, x), answers(plain, outside))
    assert list(normalising.state_dict()) == list(plain.state_dict())


# --- networks of one's own ---

MODULE = """
import argparse
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1), nn.Linear(4 * 14 * 14, 5)).double()

def needy(depth):
    return nn.Identity()

def broken():
    raise KeyError("no\\nsuch thing")

def leaves():
    argparse.ArgumentParser().parse_args(["--no-such-flag"])

def number():
    return 3

def normalising():
    from saltflat.models import small_cnn
    return small_cnn(in_channels=3, mean=(0.5,), std=(0.5,))

Class = nn.Identity
constant = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of an importable module with networks in it."""
    name = f"networks_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_factory_makes_a_network(own):
    assert isinstance(named(f"{own}:Class"), nn.Identity)
    made = named(f"{own}:network", num_classes=99, in_channels=7)  # which it does not ask for
    assert answers(made, images().double()).shape == (4, 5)


def test_a_mean_and_std_stand_before_a_factorys_network_in_its_dtype(own):
    network = named(f"{own}:network", mean=(0.5,), std=(0.25,))
    x = images().double()
    assert torch.equal(answers(network, x), answers(network.network, (x - 0.5) / 0.25))
    assert network.normalise.mean.dtype == torch.float64
    assert named("torch.nn:Identity", mean=(0.5,), std=(0.25,))(torch.ones(1, 1)).item() == 2
    message = complaint(named, f"{own}:normalising", mean=(0.5,), std=(0.5,))
    assert message == "mean, std: the network normalises its input already, expected neither"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_at_all:network", "cannot import the module of {}: ModuleNotFoundError: No module named .*"),
        (":network", "cannot import the module of {}: ValueError: .*"),
        ("OWN:nothing", "expected something to call under {}, there is None"),
        ("OWN:", "expected something to call under {}, there is None"),
        ("OWN:constant", "expected something to call under {}, there is 3"),
        ("OWN:needy", "{} cannot be called without arguments: TypeError: .* missing .* 'depth'"),
        ("OWN:broken", "{} cannot be called without arguments: KeyError: .*"),
        ("OWN:leaves", "{} cannot be called without arguments: SystemExit: 2"),
        ("OWN:number", "expected an nn.Module from {}, got int"),
    ],
)
def test_a_factory_that_makes_none_says_so(name, message, own, tmp_path):
    name = name.replace("OWN", own)
    expected = f"network: {message.format(re.escape(repr(name)))}"
    assert re.fullmatch(expected, complaint(named, name))
    path = saved({"w": torch.ones(2)}, tmp_path)
    assert re.fullmatch(f"{re.escape(str(path))}: {expected}", complaint(published.load, path, name))


def test_a_module_that_fails_or_leaves_says_so(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "raises_when_imported.py").write_text("1 / 0")
    (tmp_path / "exits_when_imported.py").write_text("raise SystemExit('usage: train')")
    with pytest.raises(
        ValueError, match="cannot import the module of 'raises_when_imported:x': ZeroDivision"
    ) as caught:
        named("raises_when_imported:x")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)  # whose traceback its author wants to see
    with pytest.raises(ValueError, match="ZeroDivisionError") as caught:
        published.load(saved({"w": torch.ones(2)}, tmp_path), "raises_when_imported:x")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "SystemExit: usage: train" in complaint(named, "exits_when_imported:x")


def test_a_factorys_weights_are_loaded(own, tmp_path):
    network = named(f"{own}:network")
    path = saved({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, tmp_path, epoch=3)
    x = images().double()
    assert torch.equal(answers(published.load(path, f"{own}:network"), x), answers(network, x))
    found = published.load(path, f"{own}:network", mean=(0.5,), std=(0.25,))
    assert torch.equal(answers(found, x), answers(network, (x - 0.5) / 0.25))


# --- layouts ---


class Within(nn.Module):
    """A module that normalises first; its constants and the network under names of its own."""

    def __init__(self, network, mean_name, std_name, place):
        super().__init__()
        layer = nn.Module() if place else self
        layer.register_buffer(mean_name, torch.tensor(MEAN).view(1, 3, 1, 1))
        layer.register_buffer(std_name, torch.tensor(STD).view(1, 3, 1, 1))
        if place:
            self.add_module(place, layer)
        self.model = network
        self.names = [layer, mean_name, std_name]

    def forward(self, x):
        layer, mean, std = self.names
        return self.model((x - getattr(layer, mean)) / getattr(layer, std))


def parallel(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", EVERY_NAME)
def test_weights_come_back(name, tmp_path):
    original = trained(EVERY_NAME[name](7))
    found = published.load(saved(parallel(original.state_dict()), tmp_path, epoch=200), name)
    assert equal_states(found.state_dict(), original.state_dict())
    assert not any(module.training for module in found.modules())
    x = images(2)
    assert torch.equal(answers(found, x), answers(original, x))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "1.", "module.module."])
def test_weights_under_prefixes_are_found(prefix, tmp_path):
    original, x = trained(wide_resnet(10, 1)), images()
    path = saved({prefix + name: tensor for name, tensor in original.state_dict().items()}, tmp_path)
    assert torch.equal(answers(published.load(path, NAME), x), answers(original, x))


def test_prefixes_are_those_that_torch_writes(tmp_path):
    original = trained(wide_resnet(10, 1))
    x = images()
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(original))
    for wrapped in (nn.DataParallel(original), nn.Sequential(nn.Identity(), original), averaged):
        assert torch.equal(
            answers(published.load(saved(wrapped.state_dict(), tmp_path), NAME), x), answers(original, x)
        )
    path = saved(parallel(averaged.state_dict()), tmp_path)
    assert torch.equal(answers(published.load(path, NAME), x), answers(original, x))


@pytest.mark.parametrize(("mean_name", "std_name"), [("mu", "sigma"), ("mean", "std")])
@pytest.mark.parametrize("place", ["", "normalize", "norm_layer"])
@pytest.mark.parametrize("within", [lambda state: state, parallel], ids=["bare", "parallel"])
def test_a_normalisation_inside_the_file_is_the_networks(mean_name, std_name, place, within, tmp_path):
    original = Within(trained(wide_resnet(10, 1)), mean_name, std_name, place).eval()
    path, x = saved(within(original.state_dict()), tmp_path), images()
    found = published.load(path, NAME)
    torch.testing.assert_close(answers(found, x), answers(original, x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(answers(original.model, x), answers(original, x), atol=1e-2)
    assert list(found.state_dict()) == list(wide_resnet(10, 1).state_dict())


def test_constants_beside_the_layers_are_found_too(tmp_path):
    """As where a network's own class holds them."""
    original = trained(wide_resnet(10, 1))
    for shape in [(1, 3, 1, 1), (3, 1, 1), (3,), (1, 3)]:
        constants = {"mu": torch.tensor(MEAN).view(shape), "sigma": torch.tensor(STD).view(shape)}
        x = images()
        expected = answers(original, (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
        found = published.load(saved({**original.state_dict(), **constants}, tmp_path), NAME)
        assert torch.equal(answers(found, x), expected)


def test_one_constant_serves_all_channels(tmp_path):
    original = trained(wide_resnet(10, 1))
    path = saved({**original.state_dict(), "mean": torch.tensor([0.5]), "std": torch.tensor(0.25).view(1)}, tmp_path)
    x = images()
    assert torch.equal(answers(published.load(path, NAME), x), answers(original, (x - 0.5) / 0.25))


def test_a_mean_and_std_of_the_readers_must_be_those_of_the_file(tmp_path):
    path = saved(Within(wide_resnet(10, 1), "mu", "sigma", "").state_dict(), tmp_path)
    x = images()
    expected = answers(published.load(path, NAME), x)
    nearly = [value + 4e-4 for value in MEAN]
    assert torch.equal(answers(published.load(path, NAME, mean=nearly, std=STD), x), expected)
    found = Normalise(MEAN, STD)
    in_file = f"{tuple(found.mean.tolist())} and {tuple(found.std.tolist())}"
    for mean, std in [((0.5, 0.4, 0.31), STD), (MEAN, (0.2, 0.25, 0.31)), ((0.5,), (0.2,)), ((0.4,) * 3, None)]:
        message = f"{path}: mean, std: expected the file's {in_file}, got {mean} and {std}"
        assert complaint(published.load, path, NAME, mean=mean, std=std) == message


def test_a_mean_and_std_of_the_readers_are_used_where_the_file_has_none(tmp_path):
    original = trained(preact_resnet18())
    path, x = saved(parallel(original.state_dict()), tmp_path), images(2)
    outside = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    found = published.load(path, "preact-resnet18", mean=MEAN, std=STD)
    assert torch.equal(answers(found, x), answers(original, outside))
    assert "give both or neither" in complaint(published.load, path, "preact-resnet18", mean=MEAN)


def test_two_normalisations_are_one_too_many(tmp_path):
    state = wide_resnet(10, 1).state_dict()
    for place in ("one", "two"):
        state |= {f"{place}.mean": torch.zeros(3), f"{place}.std": torch.ones(3)}
    message = complaint(published.load, saved(state, tmp_path), NAME)
    assert "has 'one.mean', 'one.std', 'two.mean' and 1 more left over" in message


@pytest.mark.parametrize(
    "constants",
    [
        {"mu": torch.zeros(3)},
        {"mu": torch.zeros(3), "std": torch.ones(3)},
        {"mu": torch.zeros(3), "sigma": torch.ones(1)},
        {"mu": torch.zeros(3), "other.sigma": torch.ones(3)},
    ],
)
def test_constants_that_are_no_pair_are_left_over(constants, tmp_path):
    path = saved({**wide_resnet(10, 1).state_dict(), **constants}, tmp_path)
    assert "weights of another architecture: has 'mu'" in complaint(published.load, path, NAME)


def test_a_name_that_is_none_is_left_over(tmp_path):
    path = saved({**wide_resnet(10, 1).state_dict(), "fc.": torch.zeros(3), "": torch.zeros(3)}, tmp_path)
    assert "has 'fc.', '' left over" in complaint(published.load, path, NAME)


def test_constants_that_cannot_be_are_refused(tmp_path):
    path = saved({**wide_resnet(10, 1).state_dict(), "mu": torch.zeros(2), "sigma": torch.ones(2)}, tmp_path)
    assert "mean, std: expected one value, or one for each of 3 channels" in complaint(published.load, path, NAME)
    path = saved({**wide_resnet(10, 1).state_dict(), "mu": torch.zeros(3), "sigma": torch.zeros(3)}, tmp_path)
    assert "std must be positive" in complaint(published.load, path, NAME)


def test_the_stage_that_never_runs_is_ignored(tmp_path):
    original = trained(wide_resnet(16, 1))
    state = original.state_dict()
    for name in list(state):
        if name.startswith("block1."):
            state[f"sub_{name}"] = torch.rand(state[name].shape)
    assert len(state) > len(original.state_dict())
    x = images()
    for layout in (state, parallel(state)):
        found = published.load(saved(layout, tmp_path), "wide-resnet-16-1")
        assert torch.equal(answers(found, x), answers(original, x))


def test_counters_may_be_missing_or_there(tmp_path):
    original = trained(wide_resnet(10, 1))
    x = images()
    state = {name: t for name, t in original.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(state) < len(original.state_dict())
    found = published.load(saved(state, tmp_path), NAME)
    assert torch.equal(answers(found, x), answers(original, x))
    assert found.bn1.num_batches_tracked == 0
    assert published.load(saved(original.state_dict(), tmp_path), NAME).bn1.num_batches_tracked == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_the_networks(dtype, tmp_path):
    original = trained(wide_resnet(10, 1))
    found = published.load(saved(copy.deepcopy(original).to(dtype).state_dict(), tmp_path), NAME)
    rounded = original.to(dtype).float()
    assert equal_states(found.state_dict(), rounded.state_dict())
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32, torch.int64}


def test_safetensors_of_ones_own_are_read(tmp_path):
    original = trained(small_resnet(7, widths=(8, 16, 32)))
    save_file(original.state_dict(), tmp_path / "best.safetensors")
    x = images()
    found = published.load(tmp_path / "best.safetensors", "small-resnet-8")
    assert torch.equal(answers(found, x), answers(original, x))


@pytest.mark.parametrize("name", EVERY_NAME)
def test_the_number_of_classes_is_the_files(name, tmp_path):
    path = saved(parallel(EVERY_NAME[name](13).state_dict()), tmp_path)
    assert answers(published.load(path, name), images(2)).shape == (2, 13)
    assert answers(published.load(path, name, num_classes=13), images(2)).shape == (2, 13)
    assert "has shape (13, " in complaint(published.load, path, name, num_classes=10)
    assert complaint(published.load, path, name, num_classes=0) == f"{path}: num_classes: expected at least 1, got 0"


def test_the_key_is_passed_on(tmp_path):
    last, best = trained(wide_resnet(10, 1)), trained(wide_resnet(10, 1))
    path = tmp_path / "model.pt"
    torch.save({"last": last.state_dict(), "best": best.state_dict()}, path)
    x = images()
    assert torch.equal(answers(published.load(path, NAME, key="best"), x), answers(best, x))
    assert "key: expected one of 'last', 'best'" in complaint(published.load, path, NAME)


def test_torchs_generator_is_left_as_it_was(tmp_path):
    path = saved(wide_resnet(10, 1).state_dict(), tmp_path)
    before = torch.get_rng_state()
    published.load(path, NAME)
    assert torch.equal(torch.get_rng_state(), before)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.bias"), "lacks 'fc.bias'"),
        (lambda s: [s.pop(f"bn1.{name}") for name in ("weight", "bias")], "lacks 'bn1.weight', 'bn1.bias'"),
        (lambda s: s.update({"fc2.weight": torch.ones(2, 2)}), "has 'fc2.weight' left over"),
        (lambda s: s.update({"conv1.weight": torch.ones(16, 3, 5, 5)}),
         "'conv1.weight' has shape (16, 3, 5, 5), expected (16, 3, 3, 3)"),
        (lambda s: s.update({"conv1.weight": torch.ones(16, 3, 5, 5), "bn1.bias": torch.ones(1)}),
         "'conv1.weight' has shape (16, 3, 5, 5), expected (16, 3, 3, 3) and 1 more differ"),
        (lambda s: s.update({"bn1.bias": torch.ones(64, dtype=torch.int8)}),
         "'bn1.bias' holds torch.int8, expected torch.float32"),
        (lambda s: s.update({"bn1.bias": torch.ones(64, dtype=torch.complex64)}),
         "'bn1.bias' holds torch.complex64, expected torch.float32"),
        (lambda s: s.update({"bn1.num_batches_tracked": torch.tensor(1.5)}),
         "'bn1.num_batches_tracked' holds torch.float32, expected torch.int64"),
        (lambda s: s.update({"fc3.bias": s.pop("fc.bias"), "conv1.weight": torch.ones(1)}),
         "lacks 'fc.bias'; has 'fc3.bias' left over; 'conv1.weight' has shape (1,), expected (16, 3, 3, 3)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_that_do_not_fit_say_where(change, message, prefix, tmp_path):
    state = dict(wide_resnet(10, 1).state_dict())
    change(state)
    path = saved({prefix + name: tensor for name, tensor in state.items()}, tmp_path)
    if prefix:
        message = message.replace("has 'fc", "has 'module.fc")  # what is left over has the name that the file gives it
    assert complaint(published.load, path, NAME) == f"{path}: weights of another architecture: {message}"


@pytest.mark.parametrize("name", ["preact-resnet18", "wide-resnet-16-1", "wide-resnet-10-2", "small-cnn-4"])
def test_weights_of_another_network_are_refused(name, tmp_path):
    path = saved(parallel(wide_resnet(10, 1).state_dict()), tmp_path)
    assert f"{path}: weights of another architecture: " in complaint(published.load, path, name)


def test_a_head_outside_of_the_prefix_is_not_taken_for_the_networks(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in wide_resnet(10, 1).state_dict().items()}
    path = saved({**state, "fc.weight": torch.ones(10, 64)}, tmp_path)
    assert "has 'fc.weight' left over" in complaint(published.load, path, NAME)


def test_a_number_of_channels_that_is_not_the_files_is_named(tmp_path):
    path = saved(wide_resnet(10, 1).state_dict(), tmp_path)
    message = "'conv1.weight' has shape (16, 3, 3, 3), expected (16, 1, 3, 3)"
    assert message in complaint(published.load, path, NAME, in_channels=1)


def test_a_file_that_cannot_be_read_says_so_through_load(tmp_path):
    message = complaint(published.load, tmp_path / "none.pt", NAME)
    assert message == f"{tmp_path / 'none.pt'}: expected a file of weights: No such file or directory"


PARTS = st.sampled_from(["module", "model", "net", "0", "1", "conv1", "block1", "fc"])


@settings(max_examples=50, deadline=None)
@given(st.lists(PARTS, max_size=3))
def test_any_prefix_is_taken_off_even_one_that_the_network_knows(parts):
    network = wide_resnet(10, 1)
    prefix = "".join(f"{part}." for part in parts)
    weights, constants = published.fitted({prefix + name: t for name, t in network.state_dict().items()}, network)
    assert equal_states(weights, network.state_dict())
    assert constants is None


def test_fitting_changes_no_network():
    network = wide_resnet(10, 1)
    before = copy.deepcopy(network.state_dict())
    published.fitted(wide_resnet(10, 1).state_dict(), network)
    assert equal_states(network.state_dict(), before)
