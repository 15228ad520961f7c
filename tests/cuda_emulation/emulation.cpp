// The operators of csrc/cuda as `bnfuse_emulated`, for CPU tensors: the same sources, but for the few lines that need a GPU.
#include "../../csrc/cuda/operators.cpp"

#include "../../csrc/cuda/backward.cu"
#include "../../csrc/cuda/forward.cu"
#include "../../csrc/cuda/loss.cu"

STABLE_TORCH_LIBRARY_IMPL(bnfuse_emulated, CPU, m) { bnfuse::implement(m); }

#define FOR_TESTS extern "C" __attribute__((visibility("default")))

// How the emulated device behaves from now on: its size, and whether its blocks and threads run in a shuffled order.
FOR_TESTS void emulate(int multiprocessors, bool shuffles, uint64_t seed) {
  emulation::emulator.multiprocessors = multiprocessors;
  emulation::emulator.shuffles = shuffles;
  emulation::emulator.order.seed(seed);
}

// What the compiler calls before each access, with -fsanitize=kernel-address.
#define CHECKED(size)                                                                                            \
  extern "C" EMULATOR void __asan_load##size##_noabort(uintptr_t at) { emulation::check_access(at, size, false); } \
  extern "C" EMULATOR void __asan_store##size##_noabort(uintptr_t at) { emulation::check_access(at, size, true); }
CHECKED(1)
CHECKED(2)
CHECKED(4)
CHECKED(8)
CHECKED(16)
extern "C" EMULATOR void __asan_loadN_noabort(uintptr_t at, size_t size) { emulation::check_access(at, size, false); }
extern "C" EMULATOR void __asan_storeN_noabort(uintptr_t at, size_t size) { emulation::check_access(at, size, true); }
extern "C" EMULATOR void __asan_handle_no_return() {}
extern "C" EMULATOR void __asan_before_dynamic_init(const void*) {}
extern "C" EMULATOR void __asan_after_dynamic_init() {}

// How x would be cut for a device of this size: for tests of the plan itself.
FOR_TESTS void plan(int64_t samples, int64_t channels, int64_t plane_size, bool planes, int64_t groups, bool aligned,
                     int64_t multiprocessors, int64_t (&plan)[9]) {
  const bnfuse::Walk walk = bnfuse::make_walk(samples, channels, plane_size, planes, groups, aligned, false, true, multiprocessors);
  const int64_t values[9] = {int64_t(walk.layout), walk.aligned,    walk.blocks(),   walk.threads(), walk.wide * walk.high,
                             walk.chunks,          walk.chunk_rows, walk.partials(), walk.chunk_rows / walk.high * walk.steps};
  std::copy(values, values + 9, plan);
}

// ---- kernels with one mistake each, for tests of the emulation itself ----

namespace {

struct Mistake {
  const float* given;  // [32]
  float* result;       // [32]
  int kind;
};

void mistaken_kernel(Mistake m) {
  const int t = threadIdx.x;
  float* shared = reinterpret_cast<float*>(bnfuse::shared_memory());
  uint32_t words[4];
  switch (m.kind) {
    case 1: m.result[t] = m.given[t + 1]; break;
    case 2: m.result[t - 1] = 0; break;
    case 3: const_cast<float*>(m.given)[t] = 0; break;
    case 4: bnfuse::load_16_bytes(m.given + 1, words); break;
    case 5: shared[t + 1] = 0; break;
    case 6: if (t != 7) __syncthreads(); break;
    case 7: if (t == 7) __syncthreads(); else __shfl_xor_sync(0xffffffffu, t, 1); break;
  }
  shared[t] = m.given[t];
  if (m.kind != 8) __syncthreads();
  m.result[t] = shared[31 - t];
}

}  // namespace

// What the emulation says of mistake 1, 2, …; of kind 0, which is none, nothing. `sum` is that of the results.
FOR_TESTS const char* mistake(int kind, float* sum) {
  static std::string said;
  std::vector<float> memory(96, 1.0f);  // with room around what the kernel may touch
  float* given = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 31) / 16 * 16);
  float* result = given + 40;
  emulation::emulator.tensor_count = 0;
  emulation::allow(given, 32 * sizeof(float), false);
  emulation::allow(result, 32 * sizeof(float), true);
  said.clear();
  try {
    bnfuse::launch("mistake", mistaken_kernel, 1, 32, 32 * sizeof(float), nullptr, Mistake{given, result, kind});
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  *sum = std::accumulate(result, result + 32, 0.0f);
  return said.c_str();
}
