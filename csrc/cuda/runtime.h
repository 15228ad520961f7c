// What the kernels and their launchers need of CUDA beyond the language, in one place: the launch with its check, dynamic
// shared memory, a 16-byte access. A build for the CPU that emulates CUDA's threads (tests/cuda_emulation) brings its own.
#pragma once

#ifdef BNFUSE_EMULATED
#include "cuda_emulation.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define BNFUSE_DEVICE __device__ __forceinline__

namespace bnfuse {

using Stream = cudaStream_t;

#ifdef __CUDACC__

// Runs kernel(arguments) on `stream`; an error of the launch is thrown, with the kernel's name. OVERLAPS: the kernel may start
// while the one before it ends, and waits for it by itself (wait_for_previous_kernel).
template <bool OVERLAPS = false, typename Arguments>
void launch(const char* name, void (*kernel)(Arguments), int64_t blocks, int threads, int64_t shared_bytes, Stream stream,
            const Arguments& arguments) {
  cudaLaunchAttribute overlaps{};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlaps;
  config.numAttrs = OVERLAPS;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // it is told here: left set, whoever asks next would take it for his own
  throw std::runtime_error(std::string("bnfuse: launching ") + name + " with " + std::to_string(blocks) + " blocks of " +
                           std::to_string(threads) + " threads failed: " + cudaGetErrorString(error));
}

namespace {

// The block's dynamic shared memory.
BNFUSE_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Of a kernel that is launched with OVERLAPS: until what the kernel before it has written is there. Before Hopper no kernel
// starts before that anyway.
BNFUSE_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks have said so, or are done, a kernel that is launched with OVERLAPS after this one may start and wait.
BNFUSE_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Asks for what lies there without waiting for it.
BNFUSE_DEVICE void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(from)));
}

// What another block of the same launch may have written, from where all of them see it.
template <typename A>
BNFUSE_DEVICE A load_shared_by_blocks(const A* from) {
  return __ldcg(from);
}

// 1/n for n ≥ 1, to the last bit but one; exact for 1.
BNFUSE_DEVICE float reciprocal(float n) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(n));
  return fmaf(r, fmaf(-n, r, 1.0f), r);
}

BNFUSE_DEVICE double reciprocal(double n) { return 1.0 / n; }

// In PTX, since nvcc now and then makes four accesses of one that is written in C++. Volatile keeps them in their order, so
// that loads stay together, and an element is read before it is overwritten in place.
BNFUSE_DEVICE void load_16_bytes(const void* from, uint32_t* words) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(__cvta_generic_to_global(from)));
}

BNFUSE_DEVICE void store_16_bytes(void* to, const uint32_t* words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace
#endif  // __CUDACC__

}  // namespace bnfuse
#endif  // BNFUSE_EMULATED
