// The kernels for x86-64 with AVX2 and FMA; setup.py gives this file the flags.
#define BNFUSE_KERNELS kernels_avx2
#define BNFUSE_INSTRUCTION_SET "AVX2"
#include "kernels.inl"
