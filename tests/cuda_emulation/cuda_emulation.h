// CUDA's execution model on one CPU thread, for the kernels of csrc/cuda as they are: enough of it to show that they are right
// where there is no GPU, and nothing about speed.
//
// Each thread of a block is a fiber that runs until it waits: at a barrier for its block, at a shuffle for its warp. Blocks run
// one after the other, in an order that may be shuffled, as may that of the threads; shared memory starts as NaN. Every access
// that a kernel makes, to global memory or any other, comes by check_access (the compiler puts a call before each, as for
// AddressSanitizer), which knows the tensors that the operator was given or has allocated, and which of them it may write.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <link.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define BNFUSE_DEVICE inline
// Not a kernel's code, so its accesses are not checked. What such a function calls of the standard library is, where a kernel
// runs: so it calls nothing.
#define EMULATOR __attribute__((noinline, no_sanitize("kernel-address")))

namespace emulation {

struct Index {
  unsigned x;
};
inline Index thread_index, block_index, block_size;

constexpr int WARP = 32, MOST_THREADS = 1024, MOST_TENSORS = 1024;
constexpr size_t STACK_BYTES = 96 << 10, SHARED_BYTES = 48 << 10, ARGUMENT_BYTES = 4096;

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
  char* stack = nullptr;  // kept for the next block
  ucontext_t start;
  jmp_buf position;
  bool started;
  State state;
  bool vote;                  // __syncthreads_count's
  unsigned char exchanged[8];  // what a shuffle gives, then what it gets
  int distance;
};

struct Memory {
  uintptr_t begin, end;
  bool writable;
};

struct Emulator {
  Fiber fibers[MOST_THREADS];
  alignas(16) unsigned char shared[SHARED_BYTES];
  size_t shared_bytes = 0;
  jmp_buf scheduler;
  void (*kernel)() = nullptr;
  bool in_kernel = false;
  int count = 0;  // of the last __syncthreads_count
  Memory tensors[MOST_TENSORS];
  int tensor_count = 0;
  Memory library{};
  std::string failure;
  std::mt19937_64 order{0};
  bool shuffles = false;
  int multiprocessors = 132;
};
inline Emulator emulator;

EMULATOR inline void fail(const char* what, size_t bytes = 0) {
  const bool in_kernel = emulator.in_kernel;
  emulator.in_kernel = false;
  if (emulator.failure.empty())
    emulator.failure = (bytes ? std::to_string(bytes) + " bytes " : "") + what + " (block " + std::to_string(block_index.x) +
                       ", thread " + std::to_string(thread_index.x) + ")";
  emulator.in_kernel = in_kernel;
}

// ---- memory ----

EMULATOR inline void allow(const void* data, int64_t bytes, bool writable) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (emulator.tensor_count == MOST_TENSORS) throw std::runtime_error("emulation: too many tensors");
  emulator.tensors[emulator.tensor_count++] = {begin, begin + bytes, writable};
}

EMULATOR inline bool lies_in(uintptr_t at, size_t bytes, uintptr_t begin, uintptr_t end) {
  return at >= begin && at + bytes <= end;
}

// The data of this library, where the kernels' arguments and indices are.
EMULATOR inline void find_library() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
          const uintptr_t end = begin + info->dlpi_phdr[i].p_memsz, here = reinterpret_cast<uintptr_t>(&thread_index);
          if (info->dlpi_phdr[i].p_type == PT_LOAD && here >= begin && here < end) emulator.library = {begin, end, true};
        }
        return 0;
      },
      nullptr);
}

EMULATOR inline void check_access(uintptr_t at, size_t bytes, bool writes) {
  if (!emulator.in_kernel) return;
  const Fiber& fiber = emulator.fibers[thread_index.x];
  const uintptr_t stack = reinterpret_cast<uintptr_t>(fiber.stack);
  if (lies_in(at, bytes, stack, stack + STACK_BYTES)) return;
  const uintptr_t shared = reinterpret_cast<uintptr_t>(emulator.shared);
  if (lies_in(at, bytes, shared, shared + SHARED_BYTES)) {
    if (!lies_in(at, bytes, shared, shared + emulator.shared_bytes)) fail("access beyond the block's shared memory");
    return;
  }
  if (lies_in(at, bytes, emulator.library.begin, emulator.library.end)) return;
  bool read_only = false;
  for (int i = 0; i < emulator.tensor_count; ++i) {
    const Memory& tensor = emulator.tensors[i];
    if (!lies_in(at, bytes, tensor.begin, tensor.end)) continue;
    if (!writes || tensor.writable) {
      if (at % bytes != 0 && bytes <= 16) fail("accessed where they are not aligned", bytes);
      return;
    }
    read_only = true;
  }
  fail(read_only ? "written to a tensor that is only read"
       : writes  ? "written outside of every tensor"
                 : "read outside of every tensor",
       bytes);
}

// ---- threads ----

EMULATOR inline void wait(State state) {
  Fiber& fiber = emulator.fibers[thread_index.x];
  fiber.state = state;
  emulator.in_kernel = false;
  if (_setjmp(fiber.position) == 0) _longjmp(emulator.scheduler, 1);
  emulator.in_kernel = true;
}

EMULATOR inline void fiber_main() {
  emulator.in_kernel = true;
  emulator.kernel();
  emulator.in_kernel = false;
  emulator.fibers[thread_index.x].state = State::done;
  _longjmp(emulator.scheduler, 1);
}

EMULATOR inline void resume(int thread) {
  Fiber& fiber = emulator.fibers[thread];
  thread_index.x = thread;
  if (_setjmp(emulator.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.position, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

EMULATOR inline void prepare(int thread) {
  Fiber& fiber = emulator.fibers[thread];
  if (!fiber.stack) fiber.stack = new char[STACK_BYTES];
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = STACK_BYTES;
  makecontext(&fiber.start, fiber_main, 0);
  fiber.started = false;
  fiber.state = State::ready;
}

// Lets a warp go on whose lanes have all come to a shuffle.
EMULATOR inline bool release_warp(int first) {
  Fiber* fibers = emulator.fibers;
  for (int lane = first; lane < first + WARP; ++lane)
    if (fibers[lane].state != State::at_shuffle || fibers[lane].distance != fibers[first].distance) return false;
  unsigned char given[WARP][8];
  for (int lane = 0; lane < WARP; ++lane) memcpy(given[lane], fibers[first + lane].exchanged, 8);
  for (int lane = 0; lane < WARP; ++lane) {
    memcpy(fibers[first + lane].exchanged, given[lane ^ fibers[first].distance], 8);
    fibers[first + lane].state = State::ready;
  }
  return true;
}

// Lets a block go on whose threads have all come to a barrier, or are done.
EMULATOR inline bool release_block(int threads) {
  Fiber* fibers = emulator.fibers;
  int waiting = 0, count = 0;
  for (int t = 0; t < threads; ++t) {
    if (fibers[t].state != State::at_barrier && fibers[t].state != State::done) return false;
    if (fibers[t].state == State::at_barrier) ++waiting, count += fibers[t].vote;
  }
  if (waiting && waiting < threads) fail("a barrier that some threads of the block do not reach");
  emulator.count = count;
  for (int t = 0; t < threads; ++t)
    if (fibers[t].state == State::at_barrier) fibers[t].state = State::ready;
  return waiting > 0;
}

EMULATOR inline void run_block(int threads) {
  memset(emulator.shared, 0xff, SHARED_BYTES);  // NaN
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (emulator.shuffles) std::shuffle(order.begin(), order.end(), emulator.order);
  for (int t = 0; t < threads; ++t) prepare(t);
  for (bool goes_on = true; goes_on && emulator.failure.empty();) {
    for (const int t : order)
      if (emulator.fibers[t].state == State::ready) resume(t);
    goes_on = release_block(threads);
    for (int first = 0; first < threads; first += WARP) goes_on |= release_warp(first);
  }
  for (int t = 0; t < threads && emulator.failure.empty(); ++t)
    if (emulator.fibers[t].state != State::done) fail("threads wait for each other for ever");
}

template <typename Arguments>
struct Launched {
  static inline void (*kernel)(Arguments) = nullptr;
  alignas(16) static inline unsigned char arguments[sizeof(Arguments)];
  EMULATOR static void run() { kernel(*reinterpret_cast<const Arguments*>(arguments)); }
};

template <typename T>
EMULATOR T shuffle_xor(T value, int distance) {
  static_assert(sizeof(T) <= 8, "wider than a shuffle exchanges");
  Fiber& fiber = emulator.fibers[thread_index.x];
  memcpy(fiber.exchanged, &value, sizeof(T));
  fiber.distance = distance;
  wait(State::at_shuffle);
  memcpy(&value, fiber.exchanged, sizeof(T));
  return value;
}

EMULATOR inline int barrier(bool vote) {
  emulator.fibers[thread_index.x].vote = vote;
  wait(State::at_barrier);
  return emulator.count;
}

}  // namespace emulation

// ---- CUDA's names ----

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size

inline void __syncthreads() { emulation::barrier(false); }
inline int __syncthreads_count(bool vote) { return emulation::barrier(vote); }
inline void __threadfence() {}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulation::shuffle_xor(value, distance);
}
inline int atomicAdd(int* at, int more) {
  const int before = *at;
  *at = before + more;
  return before;
}

// ---- csrc/cuda/runtime.h's names ----

namespace bnfuse {

using Stream = void*;

template <bool OVERLAPS = false, typename Arguments>
EMULATOR void launch(const char* name, void (*kernel)(Arguments), int64_t blocks, int threads, int64_t shared_bytes, Stream,
                     const Arguments& arguments) {
  using namespace emulation;
  static_assert(sizeof(Arguments) <= ARGUMENT_BYTES, "more than a launch may pass");
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > MOST_THREADS || threads % WARP != 0 ||
      shared_bytes > int64_t(SHARED_BYTES))
    throw std::runtime_error(std::string("emulation: ") + name + " cannot be launched like this");
  find_library();
  Launched<Arguments>::kernel = kernel;
  memcpy(Launched<Arguments>::arguments, &arguments, sizeof(Arguments));
  emulator.kernel = &Launched<Arguments>::run;
  emulator.shared_bytes = shared_bytes;
  emulator.failure.clear();
  block_size.x = threads;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (emulator.shuffles) std::shuffle(order.begin(), order.end(), emulator.order);
  for (const unsigned block : order) {
    block_index.x = block;
    run_block(threads);
    if (!emulator.failure.empty()) throw std::runtime_error(std::string("emulation: ") + name + ": " + emulator.failure);
  }
}

namespace {

BNFUSE_DEVICE unsigned char* shared_memory() { return emulation::emulator.shared; }

BNFUSE_DEVICE void wait_for_previous_kernel() {}

BNFUSE_DEVICE void let_next_kernel_start() {}

BNFUSE_DEVICE void prefetch(const void* from) { emulation::check_access(reinterpret_cast<uintptr_t>(from), 4, false); }

template <typename A>
BNFUSE_DEVICE A load_shared_by_blocks(const A* from) {
  return *from;
}

template <typename A>
BNFUSE_DEVICE A reciprocal(A n) {
  return A(1) / n;
}

BNFUSE_DEVICE void load_16_bytes(const void* from, uint32_t* words) {
  emulation::check_access(reinterpret_cast<uintptr_t>(from), 16, false);
  memcpy(words, from, 16);
}

BNFUSE_DEVICE void store_16_bytes(void* to, const uint32_t* words) {
  emulation::check_access(reinterpret_cast<uintptr_t>(to), 16, true);
  memcpy(to, words, 16);
}

}  // namespace
}  // namespace bnfuse
