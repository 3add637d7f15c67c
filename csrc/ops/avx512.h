// Rows of 32-bit and bf16 floats on CPUs that convert to bf16 themselves (AVX512-BF16). Where such
// a loop is bound by memory two things count that compilers do not write: results which no cache
// will hold are stored past it (an ordinary store first reads the line), and rows are fetched while
// those before them are computed.
#pragma once

#include "cpu.h"

#if defined(__x86_64__) && defined(__GLIBC__)
#define GENTRON_HAS_AVX512 1
#include <immintrin.h>

#define GENTRON_AVX512 \
  __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")))
#define GENTRON_AVX512_INLINE GENTRON_AVX512 inline __attribute__((always_inline))

namespace gentron::avx512 {

constexpr int64_t STEP = 32;  // elements: one line of bf16, two of fp32
constexpr int64_t HALF = STEP / 2;  // of one register
constexpr int64_t AHEAD = 4;  // rows between one that is read and one that is fetched

inline bool available() {
  static const bool yes =
      __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  return yes;
}

// Whether rows of this width, whole steps, are computed here.
inline bool takes(int64_t width) { return width % STEP == 0 && available(); }

GENTRON_AVX512_INLINE __m512 load(const float* x) { return _mm512_loadu_ps(x); }
GENTRON_AVX512_INLINE __m512 widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
GENTRON_AVX512_INLINE __m512 load(const BFloat16* x) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// Stores STEP elements, and leaves them in a and b as they were rounded.
template <bool streamed>
GENTRON_AVX512_INLINE void store(float* out, __m512& a, __m512& b) {
  if constexpr (streamed) {
    _mm512_stream_ps(out, a);
    _mm512_stream_ps(out + 16, b);
  } else {
    _mm512_storeu_ps(out, a);
    _mm512_storeu_ps(out + 16, b);
  }
}
template <bool streamed>
GENTRON_AVX512_INLINE void store(BFloat16* out, __m512& a, __m512& b) {
  const __m512i line = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  if constexpr (streamed) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), line);
  } else {
    _mm512_storeu_si512(out, line);
  }
  a = widen(_mm512_castsi512_si256(line));
  b = widen(_mm512_extracti64x4_epi64(line, 1));
}

template <class T>
GENTRON_INLINE void fetch_ahead(const T* row, int64_t width) {
  fetch(row + AHEAD * width, STEP);
}

// Stores whole lines past the caches.
template <class T>
GENTRON_AVX512 void stream(const T* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += LINE / static_cast<int64_t>(sizeof(T)))
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}

// Streamed stores are seen by other threads after this.
inline void fence() { _mm_sfence(); }

}  // namespace gentron::avx512
#endif
