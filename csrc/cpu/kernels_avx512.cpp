// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL); setup.py gives this file the flags.
#define BNFUSE_KERNELS kernels_avx512
#define BNFUSE_INSTRUCTION_SET "AVX-512"
#include "kernels.inl"
