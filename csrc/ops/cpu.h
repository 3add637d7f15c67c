// What the CPU operators share: instruction sets, 16-bit floats, where results are stored.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

// One source, one machine-code version an instruction set; the loader picks when the library opens.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define GENTRON_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GENTRON_CLONES
#endif
#define GENTRON_INLINE inline __attribute__((always_inline))

namespace gentron {

using c10::BFloat16;

// The type in which T is computed: fp32, fp64 for fp64.
template <class T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

GENTRON_INLINE float widen(float x) { return x; }
GENTRON_INLINE double widen(double x) { return x; }
// Plain integer arithmetic, unlike c10's own conversions, is vectorised in every clone.
GENTRON_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <class T>
GENTRON_INLINE T narrow(wide_t<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    // Round to nearest even; a NaN stays one.
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const uint32_t nan = 0x7FC0;
    return BFloat16(
        static_cast<uint16_t>(x != x ? nan : rounded), BFloat16::from_bits());
  } else {
    return x;
  }
}

constexpr int64_t LINE = 64;  // bytes of memory that caches hold together

// Has elements on their way to the second-level cache. The first level holds too few lines under
// way: fetched into it, they wait for one another. Past the end of the memory nothing happens.
template <class T>
GENTRON_INLINE void fetch(const T* row, int64_t count) {
  constexpr int64_t step = LINE / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; i += step) __builtin_prefetch(row + i, 0, 2);
}

// Whether results of so many bytes are stored past the caches, which they would leave before they
// are read; they begin with whole lines then.
inline bool streams(int64_t bytes, std::initializer_list<const void*> results) {
  constexpr int64_t STREAMED = 8 << 20;
  return bytes >= STREAMED && std::all_of(results.begin(), results.end(), [](const void* result) {
    return reinterpret_cast<uintptr_t>(result) % LINE == 0;
  });
}

}  // namespace gentron
