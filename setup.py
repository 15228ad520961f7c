"""Builds bnfuse._C, the compiled kernels, and says where packages lie. Everything else about the package is in pyproject.toml.

pip install --no-build-isolation -e .        MAX_JOBS=2 limits the compilers that run at a time

The CUDA kernels are part of it where torch has CUDA and nvcc is there, for the architectures that torch was built for or
those of TORCH_CUDA_ARCH_LIST ("8.0;9.0"). BNFUSE_CUDA=0 leaves them out; BNFUSE_CUDA=1 makes it an error if they cannot be
built.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import torch
from setuptools import find_packages, setup

if not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys() and shutil.which("nvcc"):
    # torch takes the folder above nvcc's for the toolkit; where nvcc on the PATH is a script, only nvcc itself knows better.
    ran = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    if found := re.search(r"^#\$ TOP=(.+)$", ran.stdout + ran.stderr, re.MULTILINE):
        os.environ["CUDA_HOME"] = os.path.realpath(found.group(1).strip())

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths  # noqa: E402

# One binary serves every x86-64 processor: the kernels are compiled once for each instruction set, and the best one
# that the processor has is chosen when the extension is loaded.
INSTRUCTION_SET_FLAGS = {
    "kernels_baseline.cpp": [],
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
# Autograd, allocators and pybind11 need more of torch than its stable ABI.
FULL_API_FLAGS = {name: ["-UTORCH_TARGET_VERSION", "-O2"] for name in ("autograd.cpp", "pool.cpp", "module.cpp")}
# The loops must vectorise, and NaN must flow: so what -ffast-math brings apart from its assumptions about values.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


def nvcc_output(*arguments: str) -> str:
    command = [os.path.join(CUDA_HOME, "bin", "nvcc"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def missing_for_cuda() -> str | None:
    """What stands in the way of building the CUDA kernels, if anything does."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc")):
        return f"no nvcc was found; install the CUDA toolkit {torch.version.cuda}, or say where it is with CUDA_HOME"
    version = re.search(r"release (\d+)\.", nvcc_output("--version")).group(1)
    if version != torch.version.cuda.split(".")[0]:
        return f"nvcc in {CUDA_HOME} is of CUDA {version}, and torch is built for {torch.version.cuda}; set CUDA_HOME"
    return None


def builds_cuda() -> bool:
    asked = os.environ.get("BNFUSE_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"BNFUSE_CUDA is {asked!r}, expected 0 or 1")
    missing = None if asked == "0" else missing_for_cuda()
    if asked == "1" and missing:
        raise SystemExit(f"BNFUSE_CUDA=1 asks for the CUDA kernels, and they cannot be built: {missing}")
    return asked != "0" and missing is None


def torch_architectures() -> str:
    """The architectures that torch was built for and nvcc knows, as TORCH_CUDA_ARCH_LIST has them: "8.0;9.0;12.0+PTX"."""
    known = re.findall(r"compute_(\w+)", nvcc_output("--list-gpu-arch"))
    architectures = []
    for kind, number in re.findall(r"(sm|compute)_(\d+)\b", torch._C._cuda_getArchFlags() or ""):
        if number in known:
            architectures.append(f"{number[:-1]}.{number[-1]}" + ("+PTX" if kind == "compute" else ""))
    return ";".join(architectures)


CUDA = builds_cuda()
if CUDA and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
    os.environ["TORCH_CUDA_ARCH_LIST"] = torch_architectures()


def sources() -> list[str]:
    found = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    if CUDA:
        found += sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
    if platform.machine() not in ("x86_64", "AMD64"):
        found = [s for s in found if os.path.basename(s) not in ("kernels_avx2.cpp", "kernels_avx512.cpp")]
    return found


def system_includes() -> list[str]:
    """torch's headers once more, as a system's: the compiler then warns of our code alone."""
    return [flag for path in include_paths() for flag in ("-isystem", path)]


class BuildKernels(BuildExtension):
    """Gives each kernel file its instruction set's flags, and compiles files side by side."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "use_ninja": False})

    def build_extensions(self):
        compile_one, compile_all, spawn = self.compiler._compile, self.compiler.compile, self.compiler.spawn

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            directory, name = os.path.split(src)
            if directory.endswith("cuda"):
                # USE_CUDA: of torch's headers, the part for CUDA.
                compile_one(obj, src, ext, cc_args, [*extra_postargs, "-DUSE_CUDA"], pp_opts)
                return
            flags = INSTRUCTION_SET_FLAGS.get(name)
            extra = FULL_API_FLAGS.get(name, []) if flags is None else KERNEL_FLAGS + flags
            compile_one(obj, src, ext, cc_args, extra_postargs + extra, pp_opts)

        def compile_side_by_side(*args, **kwargs):
            # Commands are made one after the other, since torch swaps compilers while it makes them; then they run
            # together.
            running = []
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                self.compiler.spawn = lambda *a, **k: running.append(pool.submit(spawn, *a, **k))
                try:
                    objects = compile_all(*args, **kwargs)
                finally:
                    self.compiler.spawn = spawn
                for compilation in running:
                    compilation.result()
            return objects

        self.compiler._compile, self.compiler.compile = compile_with_flags, compile_side_by_side
        super().build_extensions()


CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *system_includes()]
# nvcc's own fast math is left off, since NaN must flow.
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads", os.environ.get("MAX_JOBS") or "0", "-Xcompiler", "-fvisibility=hidden"]

setup(
    # The Triton kernels lie beside csrc/, and are installed within the package.
    packages=[*find_packages(include=["bnfuse*"]), "bnfuse.kernels"],
    package_dir={"bnfuse.kernels": "kernels"},
    ext_modules=[
        (CUDAExtension if CUDA else CppExtension)(
            "bnfuse._C",
            sources(),
            depends=[header for kind in ("h", "inl", "cuh") for header in glob(f"csrc/**/*.{kind}", recursive=True)],
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # the stable ABI of torch 2.10
                ("BNFUSE_TORCH_VERSION", f'"{torch.__version__}"'),
                *([("BNFUSE_CUDA", None)] if CUDA else []),
            ],
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
