// Eight elements at a time: what a thread reads, computes and writes in one go, and one byte of the mask.
#pragma once

#include "../elements.h"
#include "runtime.h"

namespace bnfuse {

constexpr int VECTOR = 8;  // elements, of any type

namespace {

// As they are in memory, in 32-bit registers.
template <typename T>
struct Vector {
  uint32_t words[VECTOR * sizeof(T) / 4];
};

BNFUSE_DEVICE void put(Vector<BFloat16>& vector, int i, BFloat16 value) {
  if (i % 2 == 0) vector.words[i / 2] = value.bits;
  else vector.words[i / 2] |= uint32_t(value.bits) << 16;
}

BNFUSE_DEVICE void put(Vector<Half>& vector, int i, Half value) {
  if (i % 2 == 0) vector.words[i / 2] = value.bits;
  else vector.words[i / 2] |= uint32_t(value.bits) << 16;
}

BNFUSE_DEVICE void put(Vector<float>& vector, int i, float value) { vector.words[i] = bit_cast<uint32_t>(value); }

BNFUSE_DEVICE void put(Vector<double>& vector, int i, double value) {
  const uint64_t bits = bit_cast<uint64_t>(value);
  vector.words[2 * i] = uint32_t(bits);
  vector.words[2 * i + 1] = uint32_t(bits >> 32);
}

BNFUSE_DEVICE BFloat16 get(const Vector<BFloat16>& vector, int i) {
  return {uint16_t(i % 2 ? vector.words[i / 2] >> 16 : vector.words[i / 2] & 0xffffu)};
}

BNFUSE_DEVICE Half get(const Vector<Half>& vector, int i) {
  return {uint16_t(i % 2 ? vector.words[i / 2] >> 16 : vector.words[i / 2] & 0xffffu)};
}

BNFUSE_DEVICE float get(const Vector<float>& vector, int i) { return bit_cast<float>(vector.words[i]); }

BNFUSE_DEVICE double get(const Vector<double>& vector, int i) {
  return bit_cast<double>(uint64_t(vector.words[2 * i]) | uint64_t(vector.words[2 * i + 1]) << 32);
}

// The first `count` of eight elements from `from` on; all eight, in 16-byte accesses, where ALIGNED. What is not loaded is 0.
template <bool ALIGNED, typename T>
BNFUSE_DEVICE Vector<T> load(const T* from, int count) {
  Vector<T> vector{};
  if (ALIGNED) {
#pragma unroll
    for (int word = 0; word < int(sizeof(vector)) / 4; word += 4)
      load_16_bytes(reinterpret_cast<const char*>(from) + 4 * word, vector.words + word);
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      if (i < count) put(vector, i, from[i]);
  }
  return vector;
}

template <bool ALIGNED, typename T>
BNFUSE_DEVICE void store(T* to, int count, const Vector<T>& vector) {
  if (ALIGNED) {
#pragma unroll
    for (int word = 0; word < int(sizeof(vector)) / 4; word += 4)
      store_16_bytes(reinterpret_cast<char*>(to) + 4 * word, vector.words + word);
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      if (i < count) to[i] = get(vector, i);
  }
}

template <typename T>
BNFUSE_DEVICE void widen(const Vector<T>& vector, Accumulator<T> (&values)[VECTOR]) {
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) values[i] = widen(get(vector, i));
}

template <typename T>
BNFUSE_DEVICE Vector<T> narrow(const Accumulator<T> (&values)[VECTOR]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    T stored;
    narrow(values[i], stored);
    put(vector, i, stored);
  }
  return vector;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
BNFUSE_DEVICE Vector<BFloat16> narrow<BFloat16>(const float (&values)[VECTOR]) {
  Vector<BFloat16> vector;
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(vector.words[i / 2]) : "f"(values[i + 1]), "f"(values[i]));
  return vector;
}

template <>
BNFUSE_DEVICE Vector<Half> narrow<Half>(const float (&values)[VECTOR]) {
  Vector<Half> vector;
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(vector.words[i / 2]) : "f"(values[i + 1]), "f"(values[i]));
  return vector;
}
#endif

}  // namespace
}  // namespace bnfuse
