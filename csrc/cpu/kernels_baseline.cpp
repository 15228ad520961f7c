// The kernels for any processor of the architecture.
#define BNFUSE_KERNELS kernels_baseline
#define BNFUSE_INSTRUCTION_SET "baseline"
#include "kernels.inl"
