"""Builds bnfuse._C, the compiled kernels. Everything else about the package is in pyproject.toml.

pip install --no-build-isolation -e .        MAX_JOBS=2 limits the compilers that run at a time
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

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
# Autograd and allocators in C++ need more of torch than its stable ABI.
FULL_API_FLAGS = {name: ["-UTORCH_TARGET_VERSION", "-O2"] for name in ("autograd.cpp", "pool.cpp")}
# The loops must vectorise, and NaN must flow: so what -ffast-math brings apart from its assumptions about values.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


def sources() -> list[str]:
    found = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
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
            name = os.path.basename(src)
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


setup(
    ext_modules=[
        CppExtension(
            "bnfuse._C",
            sources(),
            depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True),
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # the stable ABI of torch 2.10
                ("BNFUSE_TORCH_VERSION", f'"{torch.__version__}"'),
            ],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *system_includes()],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
