"""m-RWP on two processes: another split into halves than that of one, but one network, and one that goes on."""

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
    return equal


def test_m_rwp_runs_on_two_processes_and_goes_on_to_the_bit(tmp_path):
    one, other = found(on_two, tmp_path)
    assert one == other == [True] * (2 * 4 + 2 * 3)
    assert torch.equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole-20"))
    assert weights(tmp_path / "whole-31").isfinite().all()
