"""The Triton kernels compiled for sm_80 and sm_90, GPU or not: nothing spills, and memory is accessed 16 bytes at a time."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton backend needs triton, which is not installed")

KERNELS = {
    "forward_rows",
    "forward_planes",
    "finish",
    "backward_rows",
    "backward_planes",
    "site_distances",
    "sum_distances",
}
capabilities = pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])


@functools.cache
def compiled(capability: int) -> list[dict]:
    """What compile_triton.py found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_triton.py")), str(capability)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@capabilities
def test_every_kernel_compiles(capability):
    found = compiled(capability)
    assert {kernel["kernel"] for kernel in found} == KERNELS
    walks = {kernel["dtype"] for kernel in found if kernel["kernel"].startswith(("forward", "backward"))}
    assert walks >= {"float32", "bfloat16", "float16"}


@capabilities
def test_nothing_is_spilled_to_local_memory(capability):
    spilt = [kernel for kernel in compiled(capability) if kernel["STACK"] or kernel["LOCAL"]]
    assert not spilt


@capabilities
def test_memory_is_accessed_16_bytes_at_a_time(capability):
    """Wherever rows, or planes, are so long that each of them starts at a multiple of it."""
    walks = [k for k in compiled(capability) if k["kernel"].startswith(("forward", "backward")) and k["wide"]]
    assert len(walks) >= 12
    for kernel in walks:
        moved = [access for access in kernel["accesses"] if ".128" in access]
        assert any(access.startswith(("LDG.", "LDGSTS.")) for access in moved), kernel
        writes = kernel["options"]["ACT"] != "identity" or kernel["kernel"].startswith("backward")
        assert not writes or any(access.startswith("STG.") for access in moved), kernel


@pytest.mark.parametrize("kernel, registers", [("forward_rows", 104), ("backward_rows", 73)])
def test_registers_leave_room_for_the_programs_that_the_heuristic_counts_on(kernel, registers):
    """A Hopper multiprocessor has 65536: see `tuning.PROGRAMS`, for rows of bfloat16 and one group."""
    rows = [k for k in compiled(90) if k["kernel"] == kernel and k["dtype"] == "bfloat16" and k["options"]["GROUPS"] == 1]
    assert rows
    for found in rows:
        assert found["REG"] <= registers, found
