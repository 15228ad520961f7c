"""What nvcc makes of csrc/cuda: no warnings, and everything in registers. Needs nvcc, neither a GPU nor a torch that has CUDA."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")


def compile_with_nvcc(source: str, output: Path, *flags) -> str:
    """What nvcc says. Fails on any warning."""
    command = [NVCC, "-std=c++17", "-O3", "-Werror", "all-warnings", *flags, "-o", output, SOURCES / source]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.parametrize("architecture", [90, 80])
@pytest.mark.parametrize("source", ["forward.cu", "backward.cu", "loss.cu"])
def test_kernels_keep_everything_in_registers(source, architecture, tmp_path):
    said = compile_with_nvcc(source, tmp_path / "kernels.cubin", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v")
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(kernels) == len(frames) >= 4
    spilling = {kernel: frame for kernel, frame in zip(kernels, frames) if frame != ("0", "0", "0")}
    assert not spilling, f"(stack frame, spill stores, spill loads) in bytes: {spilling}"


def test_the_host_side_compiles_against_this_torch(tmp_path):
    home = Path(torch.__file__).parent / "include"
    includes = [flag for path in ("", "torch/csrc/api/include") for flag in ("-isystem", home / path)]
    macros = "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"
    warnings = "-Wall,-Wextra,-Werror,-fvisibility=hidden,-fsyntax-only"
    compile_with_nvcc("operators.cpp", tmp_path / "operators.o", "-c", "-Xcompiler", warnings, *macros, *includes)
