// Linear layers of bf16 by the tiles of AMX, with weights as they lie: no packed copy, no packing.
//
// A tile instruction takes one operand as its rows lie in memory and wants the other in pairs of
// channels. The weights, of which there are more, are the first here and the tokens, whose pairs a
// transposition of 16 × 16 words makes, the second; the result is transposed back by another one.
#pragma once

#include "avx512.h"

#ifdef GENTRON_HAS_AVX512
#define GENTRON_AMX \
  __attribute__((target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")))
#define GENTRON_AMX_INLINE GENTRON_AMX inline __attribute__((always_inline))

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace gentron::amx {

constexpr int64_t ROWS = 16;             // of a tile; and its words of 32 bits in a row
constexpr int64_t CHANNELS = 2 * ROWS;   // bf16 in a row of a tile
constexpr int64_t TOKENS = 2 * ROWS;     // of a block: two tiles side by side
constexpr int64_t TILE = ROWS * ROWS;    // words

// Whether this CPU has the tiles and the system lets the process use them.
inline bool available() {
  static const bool yes = [] {
    if (!avx512::available()) return false;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned BF16 = 1U << 22, TILES = 1U << 24;
    if ((edx & BF16) == 0 || (edx & TILES) == 0) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of Linux
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return yes;
}

// What was written is in memory: the intrinsics of g++ do not say that tiles read it.
inline void settle() { asm volatile("" ::: "memory"); }

// The shapes of the tiles while an object lives, which must not outlast the caller's work: others
// find none set, and set their own. Accumulators 0 to 3 (two tiles of outputs × two of tokens),
// weights 4 and 5, tokens 6 and 7; `second`: rows of the second tile of outputs, 0 for none.
class Tiles {
 public:
  GENTRON_AMX Tiles(int64_t first, int64_t second) {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    const auto set = [&](int tile, int64_t rows) {
      shapes.rows[tile] = static_cast<uint8_t>(rows);
      shapes.bytes[tile] = rows ? LINE : 0;
    };
    for (const int tile : {0, 1, 4}) set(tile, first);
    for (const int tile : {2, 3, 5}) set(tile, second);
    for (const int tile : {6, 7}) set(tile, ROWS);
    asm volatile("" : : "r"(&shapes) : "memory");  // as in settle(), of a local variable
    _tile_loadconfig(&shapes);
  }
  GENTRON_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// 16 × 16 words, rows and columns exchanged.
GENTRON_AMX_INLINE void transpose(__m512i (&r)[ROWS]) {
  __m512i t[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// 2^x for x ≤ 127: 2^(x - round x), a polynomial off by 1e-7, and its scale.
GENTRON_AMX_INLINE __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.321867248e-3F);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.671697938e-3F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550892952e-2F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402223800e-1F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931468559e-1F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
  return _mm512_scalef_ps(p, whole);
}

// The tanh-GELU as x · σ(2u), u = √(2/π) (x + 0.044715 x³); NaN stays NaN.
GENTRON_AMX_INLINE __m512 gelu(__m512 x) {
  constexpr float LINEAR = -2.302208198F, CUBIC = LINEAR * 0.044715F;  // -2 √(2/π) / ln 2
  const __m512 square = _mm512_mul_ps(x, x);
  const __m512 slope = _mm512_fmadd_ps(square, _mm512_set1_ps(CUBIC), _mm512_set1_ps(LINEAR));
  // Beyond 2^±64 it is x or 0: to fp32 the tanh is 1 long before, and subnormal numbers are slow.
  const __m512 bound = _mm512_set1_ps(64.0F), unbounded = _mm512_mul_ps(x, slope);
  const __mmask16 is_zero = _mm512_cmp_ps_mask(unbounded, bound, _CMP_GE_OQ);
  __m512 power = _mm512_min_ps(bound, unbounded);
  power = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), bound), power);
  const __m512 denominator = _mm512_add_ps(power_of_two(power), _mm512_set1_ps(1.0F));
  __m512 inverse = _mm512_rcp14_ps(denominator);  // and a step of Newton's
  inverse = _mm512_mul_ps(
      inverse, _mm512_fnmadd_ps(denominator, inverse, _mm512_set1_ps(2.0F)));
  return _mm512_maskz_mul_ps(static_cast<__mmask16>(~is_zero), x, inverse);
}

// A block of at most TOKENS rows of x (…, channels) in tiles of pairs: of every CHANNELS channels
// one of the first 16 tokens, then one of the others; zeros where there is no token.
GENTRON_AMX inline void pack(const BFloat16* x, int64_t tokens, int64_t channels, uint32_t* tiles) {
  for (int64_t k = 0; k < channels; k += CHANNELS) {
    for (int64_t half = 0; half < 2; ++half, tiles += TILE) {
      __m512i rows[ROWS];
#pragma GCC unroll 16
      for (int64_t i = 0; i < ROWS; ++i) {
        const int64_t token = half * ROWS + i;
        rows[i] = token < tokens ? _mm512_loadu_si512(x + token * channels + k)
                                 : _mm512_setzero_si512();
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < ROWS; ++i) _mm512_store_si512(tiles + i * ROWS, rows[i]);
    }
  }
}

// Up to 32 outputs of a block of tokens, into sums[output][token] (32, TOKENS): weight, that many
// rows `stride` elements apart; the tiles are set.
template <bool both>
GENTRON_AMX_INLINE void multiply(const BFloat16* weight, int64_t stride, const uint32_t* tokens,
                                 int64_t channels, float* sums) {
  constexpr int64_t WIDE = TOKENS * sizeof(float);
  const auto bytes = static_cast<int64_t>(stride * sizeof(BFloat16));
  settle();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const BFloat16* second = weight + ROWS * stride;
  for (int64_t k = 0; k < channels; k += CHANNELS, tokens += 2 * TILE) {
    _tile_loadd(6, tokens, LINE);
    _tile_loadd(7, tokens + TILE, LINE);
    _tile_loadd(4, weight + k, bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (both) {
      _tile_loadd(5, second + k, bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, WIDE);
  _tile_stored(1, sums + ROWS, WIDE);
  if constexpr (both) {
    _tile_stored(2, sums + ROWS * TOKENS, WIDE);
    _tile_stored(3, sums + ROWS * TOKENS + ROWS, WIDE);
  }
}

// Sums of 32 outputs of 16 tokens with their bias, through the GELU where asked, as rows of words:
// outputs 2i and 2i + 1 of every token.
template <bool with_gelu>
GENTRON_AMX_INLINE void finish(const float* sums, const float* bias, __m512i (&rows)[ROWS]) {
  alignas(64) static constexpr uint16_t PAIRS[] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(PAIRS);
#pragma GCC unroll 16
  for (int64_t i = 0; i < ROWS; ++i) {
    __m512 a = _mm512_add_ps(_mm512_load_ps(sums + 2 * i * TOKENS), _mm512_set1_ps(bias[2 * i]));
    __m512 b = _mm512_add_ps(_mm512_load_ps(sums + (2 * i + 1) * TOKENS),
                             _mm512_set1_ps(bias[2 * i + 1]));
    if constexpr (with_gelu) {
      a = gelu(a);
      b = gelu(b);
    }
    rows[i] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
}

// A block of tokens (tiles of `pack`) times a weight (outputs, channels), rows `stride` elements
// apart, into `out`, rows `outputs` elements apart. bias: outputs, and zeros up to 32 divide them.
template <bool with_gelu>
GENTRON_AMX inline void linear_block(const uint32_t* tiles, int64_t tokens, const BFloat16* weight,
                                     int64_t stride, const float* bias, int64_t channels,
                                     int64_t outputs, BFloat16* out) {
  alignas(64) float sums[CHANNELS * TOKENS] = {};
  const auto store = [&](int64_t n, int64_t count) GENTRON_AMX {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    for (int64_t first = 0; first < tokens; first += ROWS) {
      __m512i rows[ROWS];
      finish<with_gelu>(sums + first, bias + n, rows);
      transpose(rows);
      BFloat16* row = out + first * outputs + n;
      const int64_t last = std::min(ROWS, tokens - first);
      if (last == ROWS && count == CHANNELS) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < ROWS; ++i) _mm512_storeu_si512(row + i * outputs, rows[i]);
      } else {
#pragma GCC unroll 16
        for (int64_t i = 0; i < ROWS; ++i)
          if (i < last) _mm512_mask_storeu_epi16(row + i * outputs, mask, rows[i]);
      }
    }
  };
  const int64_t whole = outputs / CHANNELS * CHANNELS, rest = outputs - whole;
  if (whole > 0) {
    const Tiles set(ROWS, ROWS);
    for (int64_t n = 0; n < whole; n += CHANNELS) {
      multiply<true>(weight + n * stride, stride, tiles, channels, sums);
      store(n, CHANNELS);
    }
  }
  if (rest > 0) {
    const Tiles set(std::min(rest, ROWS), std::max<int64_t>(0, rest - ROWS));
    const BFloat16* last = weight + whole * stride;
    if (rest > ROWS) {
      multiply<true>(last, stride, tiles, channels, sums);
    } else {
      multiply<false>(last, stride, tiles, channels, sums);
    }
    store(whole, rest);
  }
}

}  // namespace gentron::amx
#endif
