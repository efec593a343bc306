"""Drawn weights on two processes: m-RWP's halves are not those of one, but it is one network, and one that goes on;
ARWP's memory goes on on another number of processes.
"""

from dataclasses import replace

import pytest
import torch
from ranks import found
from test_train_ranks import BASE, begun, weights

from saltflat import parallel
from saltflat.lab import trainings
from saltflat.lab.config import Awp
from saltflat.train import Stepped

pytestmark = pytest.mark.slow

# 63 examples in batches of 20 leave one of 3: a rank has one row, and the other two; in batches of 31 one of 1
CONFIGS = {
    size: replace(
        BASE,
        recipe="m-rwp",
        data=replace(BASE.data, examples=63),
        awp=Awp("m-rwp", gamma=0.01, share=0.5),
        optimizer=replace(BASE.optimizer, batch_size=size),
    )
    for size in (20, 31)
}
ARWP = replace(BASE, recipe="arwp", awp=Awp("arwp", gamma=0.01, eta=100.0))


def on_two(folder):
    """Whether weights were equal on both after every step; to the bit."""
    real, equal = trainings.fit, []

    def fit(model, *arguments, **named):
        for event in real(model, *arguments, **named):
            if isinstance(event, Stepped):
                one, other = parallel.everyones(torch.cat([p.detach().flatten() for p in model.parameters()]))
                equal.append(torch.equal(one, other))
            yield event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saltflat.parallel.launched", lambda: False)
        with pytest.MonkeyPatch.context() as watched:
            watched.setattr(trainings, "fit", fit)
            for size, config in CONFIGS.items():
                trainings.train(config, folder / f"whole-{size}")
        begun(CONFIGS[20], folder / "stopped", 5)
        trainings.resume(folder / "stopped")
        begun(ARWP, folder / "left", 5)
    return equal


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    equal = found(on_two, folder)
    trainings.train(ARWP, folder / "one")
    trainings.resume(folder / "left")
    torch.set_num_threads(threads)
    return folder, equal


def test_m_rwp_runs_on_two_processes_and_goes_on_to_the_bit(runs):
    folder, (one, other) = runs
    assert one == other == [True] * (2 * 4 + 2 * 3)
    assert torch.equal(weights(folder / "stopped"), weights(folder / "whole-20"))
    assert weights(folder / "whole-31").isfinite().all()


def test_one_process_goes_on_with_what_two_have_remembered(runs):
    folder, _ = runs
    torch.testing.assert_close(weights(folder / "left"), weights(folder / "one"), rtol=0, atol=1e-5)
