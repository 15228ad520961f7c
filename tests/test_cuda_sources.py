"""What nvcc makes of csrc/cuda: no warnings, all in registers, wide accesses. Needs nvcc, no GPU and no torch that has CUDA."""

import functools
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


@functools.cache
def compiled(source: str, architecture: int, folder: Path) -> tuple[Path, str]:
    """The cubin, and what the compilers said of it."""
    cubin = folder / f"{source}.sm_{architecture}.cubin"
    return cubin, compile_with_nvcc(source, cubin, "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cubins")


architectures = pytest.mark.parametrize("architecture", [90, 80])


@architectures
@pytest.mark.parametrize("source", ["forward.cu", "backward.cu", "loss.cu"])
def test_kernels_keep_everything_in_registers(source, architecture, folder):
    _, said = compiled(source, architecture, folder)
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(kernels) == len(frames) >= 4
    spilling = {kernel: frame for kernel, frame in zip(kernels, frames) if frame != ("0", "0", "0")}
    assert not spilling, f"(stack frame, spill stores, spill loads) in bytes: {spilling}"


@architectures
@pytest.mark.parametrize("source", ["forward.cu", "backward.cu"])
def test_aligned_kernels_move_16_bytes_at_a_time(source, architecture, folder):
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton, which is not installed")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin, _ = compiled(source, architecture, folder)
    text = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = {name: code for name, code in re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", text, re.DOTALL)}
    aligned = {name: code for name, code in kernels.items() if re.search(r"(forward|backward)_kernel.*6AccessE[123]", name)}
    assert len(aligned) >= 30
    for name, code in aligned.items():
        assert "LDG.E.128" in code and "STG.E.128" in code, name
        # The second launch of forward may start as soon as the first is on its way; before Hopper there is no such thing.
        assert ("PREEXIT" in code) == (architecture >= 90 and "forward_kernel" in name), name
    finishing = [code for name, code in kernels.items() if "finish_kernel" in name]
    assert all(("ACQBULK" in code) == (architecture >= 90) for code in finishing)
    assert len(finishing) == (2 if source == "forward.cu" else 0)


def test_the_host_side_compiles_against_this_torch(tmp_path):
    home = Path(torch.__file__).parent / "include"
    includes = [flag for path in ("", "torch/csrc/api/include") for flag in ("-isystem", home / path)]
    macros = "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"
    warnings = "-Wall,-Wextra,-Werror,-fvisibility=hidden,-fsyntax-only"
    compile_with_nvcc("operators.cpp", tmp_path / "operators.o", "-c", "-Xcompiler", warnings, *macros, *includes)
