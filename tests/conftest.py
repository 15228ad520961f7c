"""What every test runs under: one thread, the same hypothesis examples each time, and poisoned memory."""

import hypothesis
import pytest
import torch

from bnfuse import backends

hypothesis.settings.register_profile("bnfuse", deadline=None, derandomize=True, max_examples=60, database=None)
hypothesis.settings.load_profile("bnfuse")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def poisoned_memory():
    """Fresh memory, torch's and the kernels' own, is NaN (integers: their largest value), so an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if backends.extension:
        backends.extension.poison_pool(True)
    yield
    if backends.extension:
        backends.extension.poison_pool(False)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def extension():
    if backends.extension is None:
        pytest.fail(f"the C++ extension is part of what is tested, and {backends._description('cpp').reason}", pytrace=False)
