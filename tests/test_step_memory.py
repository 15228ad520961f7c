"""The memory of a step as the benchmarks measure it: what bnfuse keeps of one step counts as memory that the next one takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from bnfuse import backends

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from step_memory import child_environment  # noqa: E402

# A step that is one site: its output, of 32 MB, lives at the peak, however often there has been one before.
MEASURE = """
import sys; sys.path.append(sys.argv[1])
import torch
from bnfuse import ops
from step_memory import peak_bytes

x, ones, zeros = torch.randn(32, 64, 64, 64), torch.ones(64), torch.zeros(64)
print(peak_bytes(lambda: ops.bn_act(x, ones, zeros), torch.device("cpu")), x.nbytes)
"""


@pytest.mark.skipif(backends.extension is None, reason="the reference keeps no memory")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_the_kernels_keep_of_one_step_counts_in_the_next():
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(BENCHMARKS)], env=child_environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    peak, output = map(int, ran.stdout.split())
    assert output <= peak < 1.5 * output
