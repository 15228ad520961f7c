"""What every test runs under: one thread, the same hypothesis examples each time, poisoned memory, and Triton's interpreter."""

import os

# Whether Triton's kernels are interpreted is decided when triton is first imported, which torch may do: so, before torch. With
# a GPU the same tests run the compiled kernels.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it a deterministic cuBLAS refuses to work

import importlib.util

import hypothesis
import pytest
import torch
import triton_interpreter

from bnfuse import backends

hypothesis.settings.register_profile("bnfuse", deadline=None, derandomize=True, max_examples=60, database=None)
hypothesis.settings.load_profile("bnfuse")
torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    triton_interpreter.mend()


@pytest.fixture(scope="session")
def poisoned_memory():
    """Fresh memory, torch's and the kernels' own, is NaN (integers: their largest value), so an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    # On a GPU some of torch's own operators have no deterministic version: a warning must do there.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
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
