"""Every loop of docs/loops.md runs, and trains as the plain one does."""

import copy
import logging
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric import Fabric
from networks import convolutional, equal_states, state
from torch.utils.data import DataLoader, TensorDataset

from saltflat import PGD, Linf, perturbed
from saltflat.inputs import zero
from saltflat.random import seeded
from saltflat.step import in_mode

PAGE = Path(__file__).parent.parent / "docs" / "loops.md"
TEXT = PAGE.read_text()
AT_X = PGD(Linf(8 / 255, box=None), 2 / 255, 3, zero)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


def blocks():
    """All names of the page's blocks, run one after the other."""
    names = {"__name__": "loops"}
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def page():
    return blocks()


@pytest.fixture(autouse=True)
def _alone():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert not PartialState().use_distributed


def network(dtype=torch.float32, batch_norm=True):
    return convolutional(batch_norm).to(dtype)


def batches(dtype=torch.float32, n=32):
    x, y = torch.rand(n, 3, 6, 6, dtype=torch.float64, generator=seeded(1)).to(dtype), torch.arange(n) % 3
    return list(zip(x.split(8), y.split(8), strict=True))


def loader():
    """The same, as a DataLoader."""
    return DataLoader(TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True))), batch_size=8)


def trained(loop, model, *arguments):
    model = copy.deepcopy(model).train()
    loop(model, *arguments)
    return state(model)


def test_every_loop_of_the_page_is_tested(page):
    loops = {name for name, value in page.items() if getattr(value, "__module__", None) == "loops"} - {"sgd"}
    others = {"smoothed", "accumulated", "mixed", "Classifier", "lightning", "with_fabric", "with_accelerate"}
    late_and_paired = {"from_the_tenth", "Paired", "paired", "lightning_trades"}
    assert loops == {"plain", *others, *late_and_paired}
    assert TEXT.count("```python") == 10


def test_the_pages_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(targets) == 4
    for target in targets:
        assert (PAGE.parent / target).is_file()


def test_another_optimiser_a_schedule_and_soft_labels_need_nothing_of_the_loop():
    def adam(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=4)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer

    page, model = blocks(), network()
    page["sgd"] = adam
    soft = [(x, 0.9 * torch.eye(3)[y] + 0.1 / 3) for x, y in batches()]
    found = trained(page["smoothed"], model, batches(), 4, 3)
    assert equal_states(found, trained(page["plain"], model, soft))
    assert not equal_states(found, trained(page["plain"], model, batches()))


def test_accumulation_is_the_plain_loop(page):
    """To 1e-12 in float64, without BatchNorm, also where micro-batches are not equal."""
    model = network(torch.float64, batch_norm=False)
    expected = trained(page["plain"], model, batches(torch.float64, 30))
    assert not equal_states(expected, state(model))
    for parts in (2, 3):
        for name, tensor in trained(page["accumulated"], model, batches(torch.float64, 30), parts).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)


def test_a_scaler_changes_no_bit(page):
    """The page's loop under autocast, against one without the scale."""

    def unscaled(model, batches):
        optimizer, generator = page["sgd"](model), seeded(0)
        for x, y in batches:
            with in_mode(model, "eval"), torch.autocast("cpu", torch.bfloat16):
                x_adv = page["attack"](page["objective"].inner(model, x, y), x, generator=generator)

            def loss():
                with torch.autocast("cpu", torch.bfloat16):
                    return page["objective"].outer(model, x, x_adv, y)  # noqa: B023  # called at once, below

            optimizer.zero_grad()
            with perturbed(model, loss, page["ball"]):
                loss().backward()
            optimizer.step()

    model = network()
    assert equal_states(trained(page["mixed"], model, batches()), trained(unscaled, model, batches()))


def test_in_fp16_the_attack_of_the_page_moves_what_it_moves_in_bf16(page):
    """Of a network that is sure of itself, whose gradients without a scale are below fp16's smallest number, 6e-8."""
    model, (x, _), moved = network(batch_norm=False), batches()[0], []
    with torch.no_grad():
        model[6].bias[0] = 19.0

    def recording(f, x, generator):
        x_adv = AT_X(f, x)
        moved.append((x_adv != x).float().mean().item())
        return x_adv

    page = page | {"attack": recording}
    mixed = type(page["mixed"])(page["mixed"].__code__, page, "mixed", page["mixed"].__defaults__)
    for dtype in (torch.bfloat16, torch.float16):
        trained(mixed, model, [(x, torch.zeros(8, dtype=torch.int64))], "cpu", dtype)
    assert min(moved) > 0.9


def one_v_each(page, model, batches, start_of, accumulate=1):
    """The plain loop with an ascent for every micro-batch; `start_of(index)` draws the attack's start."""
    optimizer, objective = page["sgd"](model), page["objective"]
    for index, (x, y) in enumerate(batches):
        with in_mode(model, "eval"):
            x_adv = page["attack"](objective.inner(model, x, y), x, generator=start_of(index))

        loss = partial(objective.outer, model, x, x_adv, y)
        with perturbed(model, loss, page["ball"]):
            (loss() / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_is_the_plain_loop_to_the_bit(page, accumulate):
    model = network()
    loop = partial(page["lightning"], accelerator="cpu", accumulate_grad_batches=accumulate, **QUIET)
    found = trained(loop, model, loader())
    expected = trained(partial(one_v_each, page), model, batches(), lambda index: seeded(0, 0, index, 0), accumulate)
    assert equal_states(found, expected)


def test_lightning_with_trades_is_the_plain_loop_to_the_bit():
    page, model = blocks(), network()
    found = trained(partial(page["lightning_trades"], accelerator="cpu", **QUIET), model, loader())
    of_at = trained(partial(one_v_each, page), model, batches(), lambda index: seeded(0, 0, index, 0), 1)
    page["objective"] = page["trades"]
    expected = trained(partial(one_v_each, page), model, batches(), lambda index: seeded(0, 0, index, 0), 1)
    assert equal_states(found, expected)
    assert not equal_states(found, of_at)


def test_weights_climb_from_the_tenth_epoch_on(page):
    model, ((x, y), *_) = network(), batches()
    before = state(model)
    for epoch in (0, 8, 9, 20):
        with page["from_the_tenth"](model, lambda: torch.nn.functional.cross_entropy(model(x), y), epoch):
            assert equal_states(state(model), before) == (epoch < 9)
        assert equal_states(state(model), before)


def fabric(precision):
    return Fabric(accelerator="cpu", devices=1, precision=precision)


def test_fabric_is_the_plain_loop_to_the_bit(page):
    model = network()
    found = trained(lambda model, batches: page["with_fabric"](fabric("32-true"), model, batches), model, batches())
    assert equal_states(found, trained(page["plain"], model, batches()))


def under_bf16(page, model, batches, rounded, generator):
    """The plain loop under autocast; `rounded` is what training's forward does to its input."""
    optimizer, objective = page["sgd"](model), page["objective"]
    for x, y in batches:
        with in_mode(model, "eval"), torch.autocast("cpu", torch.bfloat16):
            x_adv = page["attack"](objective.inner(model, x, y), x, generator=generator)

        def loss(x_adv):
            with torch.autocast("cpu", torch.bfloat16):
                return objective.outer(model, x, x_adv, y)  # noqa: B023  # called at once, below

        optimizer.zero_grad()
        with perturbed(model, partial(loss, x_adv), page["ball"]):
            loss(rounded(x_adv)).backward()
        optimizer.step()


def test_fabric_in_bf16_is_the_plain_loop_under_autocast(page):
    model = network()
    found = trained(lambda model, batches: page["with_fabric"](fabric("bf16-mixed"), model, batches), model, batches())
    expected = trained(partial(under_bf16, page), model, batches(), torch.Tensor.bfloat16, seeded(0))
    assert equal_states(found, expected)


def test_fabric_refuses_the_ascent_through_what_it_wrapped(page):
    """Why the page does not do that."""
    one = fabric("bf16-mixed")
    wrapped = one.setup(network())
    with pytest.raises(RuntimeError, match=r"requires you to call `fabric.backward\(loss\)`"):
        with perturbed(wrapped, lambda: wrapped(batches()[0][0]).sum(), page["ball"]):
            pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_is_the_plain_loop_to_the_bit(page, accumulate):
    model, accelerator = network(), Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    found = trained(lambda model, batches: page["with_accelerate"](accelerator, model, batches), model, loader())
    generators = {parts: seeded(0, 0) for parts in (1, 2)}
    expected = {
        parts: trained(partial(one_v_each, page), model, batches(), lambda index, g=generator: g, parts)
        for parts, generator in generators.items()
    }
    assert equal_states(found, expected[accumulate])
    assert not equal_states(found, expected[3 - accumulate])


def test_accelerate_steps_with_what_is_left_at_the_end_of_an_epoch(page):
    """Four batches in threes: two steps. A loader that was not prepared would end with a gradient and no step."""
    model, accelerator, steps = network(), Accelerator(cpu=True, gradient_accumulation_steps=3), []

    def counted(model):
        optimizer = sgd(model)
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        return optimizer

    sgd = page["sgd"]
    changed = page | {"sgd": counted}
    loop = type(page["plain"])(page["with_accelerate"].__code__, changed, "with_accelerate")
    trained(lambda model, batches: loop(accelerator, model, batches), model, loader())
    assert len(steps) == 2


def test_accelerate_in_bf16_is_the_plain_loop_under_autocast(page):
    model, accelerator = network(), Accelerator(cpu=True, mixed_precision="bf16")
    found = trained(lambda model, batches: page["with_accelerate"](accelerator, model, batches), model, loader())
    expected = trained(partial(under_bf16, page), model, batches(), torch.Tensor.float, seeded(0, 0))
    assert equal_states(found, expected)


RANKS = """
import os, sys, torch, test_loops
from accelerate.utils import DataLoaderConfiguration
torch.set_num_threads(1)
page, model, rank = test_loops.blocks(), test_loops.fixed(), int(os.environ["RANK"])
page["attack"] = lambda f, x, generator: x
if sys.argv[1] == "fabric":
    one = test_loops.Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="32-true")
    one.launch()
    page["with_fabric"](one, model, [(x[rank::2], y[rank::2]) for x, y in test_loops.batches()])
else:
    halves = DataLoaderConfiguration(split_batches=True)
    page["with_accelerate"](test_loops.Accelerator(cpu=True, dataloader_config=halves), model, test_loops.loader())
if rank == 0:
    torch.save(test_loops.state(model), sys.argv[2])
torch.distributed.destroy_process_group()  # or the process may abort at its end, while Gloo's threads still run
"""


def fixed():
    torch.manual_seed(0)
    return network(batch_norm=False).train()


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["fabric", "accelerate"])
def test_two_ranks_with_half_the_batch_each_are_the_plain_loop(framework, tmp_path):
    """To 1e-7 in float32: v is the whole batch's, and each rank's the same."""
    page, expected = blocks(), fixed()
    page["attack"] = lambda f, x, generator: x
    page["plain"](expected, batches())
    script, found = tmp_path / "ranks.py", tmp_path / "weights.pt"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tests = str(Path(__file__).parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((tests, str(PAGE.parent.parent)))}
    done = subprocess.run([*command, script, framework, found], env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()
    for name, tensor in torch.load(found).items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=1e-7)
