"""Every test starts from the same global seed, on one thread, so that what it draws does not depend on its
neighbours.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
