// LayerNorm + adaLN modulation, and the chain residual + gate · y → LayerNorm → modulation; forward
// and backward. A token's row stays in the first-level cache between its passes, so memory is read
// and written once.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "avx512.h"
#include "cpu.h"

namespace gentron {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A thread's share of work is at least this many elements.
constexpr int64_t GRAIN = 32768;
// Tokens whose row gradients are summed before they are stored, whatever the number of threads.
constexpr int64_t CHUNK = 128;

int64_t grain(int64_t elements) {
  return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements));
}

template <class T>
GENTRON_CLONES void widen_row(const T* __restrict row, wide_t<T> offset, wide_t<T>* __restrict out,
                              int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = widen(row[i]) + offset;
}

template <class W>
GENTRON_CLONES void multiply_row(const W* __restrict factor, W* __restrict row, int64_t width) {
  for (int64_t i = 0; i < width; ++i) row[i] *= factor[i];
}

// The rows (R, D), or (table (P, D), index (R,)), of one operand: each serves tokens / R
// consecutive tokens. An operand that is absent is the same row of one value everywhere.
template <class T>
class Rows {
 public:
  using W = wide_t<T>;

  Rows(const char* name, const OptionalTensor& table, const OptionalTensor& index, int64_t tokens,
       int64_t width, W absent, W offset = 0)
      : span_(std::max<int64_t>(1, tokens)), width_(width), absent_(absent), offset_(offset) {
    if (!table) return;
    const bool wide = table->scalar_type() == c10::CppTypeToScalarType<W>::value;
    TORCH_CHECK_TYPE(wide || table->scalar_type() == c10::CppTypeToScalarType<T>::value, name,
                     " must have x's dtype or be computed in fp32, got ", table->scalar_type());
    TORCH_CHECK_VALUE(table->dim() == 2 && table->size(1) == width && table->stride(1) == 1, name,
                      " must be dense rows of width ", width, ", got ", table->sizes());
    count_ = table->size(0);
    stride_ = table->stride(0);
    (wide ? wide_ : narrow_) = table->const_data_ptr();
    if (index) {
      TORCH_CHECK_VALUE(index->scalar_type() == at::kLong && index->dim() == 1 &&
                            index->is_contiguous(),
                        name, "'s index must be a dense int64 vector");
      index_ = index->const_data_ptr<int64_t>();
      for (int64_t i = 0; i < index->size(0); ++i)
        TORCH_CHECK_INDEX(index_[i] >= 0 && index_[i] < count_, name, "'s index ", index_[i],
                          " is outside its table of ", count_, " rows");
      count_ = index->size(0);
    }
    TORCH_CHECK_VALUE(count_ > 0 ? tokens % count_ == 0 : tokens == 0, name, " has ", count_,
                      " rows, which do not divide ", tokens, " tokens");
    if (tokens > 0) span_ = tokens / count_;
  }

  bool present() const { return wide_ || narrow_; }
  int64_t count() const { return present() ? count_ : 1; }
  int64_t span() const { return span_; }

  void load(int64_t row, W* out) const {
    if (!present()) {
      std::fill_n(out, width_, absent_);
      return;
    }
    const int64_t at = (index_ ? index_[row] : row) * stride_;
    if (wide_) {
      widen_row(static_cast<const W*>(wide_) + at, offset_, out, width_);
    } else {
      widen_row(static_cast<const T*>(narrow_) + at, offset_, out, width_);
    }
  }

 private:
  int64_t span_, width_, count_ = 0, stride_ = 0;
  W absent_, offset_;
  const void* wide_ = nullptr;
  const void* narrow_ = nullptr;
  const int64_t* index_ = nullptr;
};

// The row of `rows` that serves the token asked for last, widened.
template <class T>
class Cursor {
 public:
  explicit Cursor(const Rows<T>& rows, int64_t width) : rows_(rows), buffer_(width) {}

  // Whether the row changed.
  bool move(int64_t token) {
    const int64_t row = token / rows_.span();
    if (row == row_) return false;
    rows_.load(row, buffer_.data());
    row_ = row;
    return true;
  }
  wide_t<T>* row() { return buffer_.data(); }
  // The first token after `token` that another row serves.
  int64_t end(int64_t token) const { return (token / rows_.span() + 1) * rows_.span(); }

 private:
  const Rows<T>& rows_;
  std::vector<wide_t<T>> buffer_;
  int64_t row_ = -1;
};

// Four sums at a time: one alone waits for itself, an addition after the other.
template <class W>
GENTRON_INLINE W sum(const W* a, int64_t width) {
  const int64_t part = width / 4;
  W s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t i = 0; i < part; ++i) {
    s0 += a[i];
    s1 += a[i + part];
    s2 += a[i + 2 * part];
    s3 += a[i + 3 * part];
  }
  for (int64_t i = 4 * part; i < width; ++i) s0 += a[i];
  return (s0 + s1) + (s2 + s3);
}

template <class W>
GENTRON_INLINE W dot(const W* a, const W* b, int64_t width) {
  const int64_t part = width / 4;
  W s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t i = 0; i < part; ++i) {
    s0 += a[i] * b[i];
    s1 += a[i + part] * b[i + part];
    s2 += a[i + 2 * part] * b[i + 2 * part];
    s3 += a[i + 3 * part] * b[i + 3 * part];
  }
  for (int64_t i = 4 * part; i < width; ++i) s0 += a[i] * b[i];
  return (s0 + s1) + (s2 + s3);
}

// Sum of the squared distances from `center`.
template <class W>
GENTRON_INLINE W squares(const W* a, W center, int64_t width) {
  const int64_t part = width / 4;
  W s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t i = 0; i < part; ++i) {
    const W d0 = a[i] - center, d1 = a[i + part] - center;
    const W d2 = a[i + 2 * part] - center, d3 = a[i + 3 * part] - center;
    s0 += d0 * d0;
    s1 += d1 * d1;
    s2 += d2 * d2;
    s3 += d3 * d3;
  }
  for (int64_t i = 4 * part; i < width; ++i) s0 += (a[i] - center) * (a[i] - center);
  return (s0 + s1) + (s2 + s3);
}

// What is added to x: nothing, y of every token, or one row for all of them.
enum class Update { NONE, TOKENS, ROW };

// Consecutive tokens that the same rows serve. With Update::ROW, `gate` holds gate · y.
template <class T, Update update>
GENTRON_CLONES void forward_tokens(const T* __restrict x, const T* __restrict y,
                                   const wide_t<T>* __restrict gate,
                                   const wide_t<T>* __restrict scale,
                                   const wide_t<T>* __restrict shift, T* __restrict residual,
                                   T* __restrict out, wide_t<T>* __restrict stream,
                                   int64_t tokens, int64_t width, double eps) {
  using W = wide_t<T>;
  for (int64_t token = 0; token < tokens; ++token) {
    if constexpr (update == Update::TOKENS) {
      for (int64_t i = 0; i < width; ++i)
        residual[i] = narrow<T>(widen(x[i]) + gate[i] * widen(y[i]));
    } else if constexpr (update == Update::ROW) {
      for (int64_t i = 0; i < width; ++i) residual[i] = narrow<T>(widen(x[i]) + gate[i]);
    }
    const T* rounded = update == Update::NONE ? x : residual;
    for (int64_t i = 0; i < width; ++i) stream[i] = widen(rounded[i]);
    const W mean = sum(stream, width) / width;
    const W rstd = 1 / std::sqrt(squares(stream, mean, width) / width + static_cast<W>(eps));
    for (int64_t i = 0; i < width; ++i)
      out[i] = narrow<T>((stream[i] - mean) * rstd * scale[i] + shift[i]);
    x += width;
    out += width;
    if constexpr (update == Update::TOKENS) y += width;
    if constexpr (update != Update::NONE) residual += width;
  }
}

#ifdef GENTRON_HAS_AVX512
// forward_tokens with one loop over a token's row, which writes the row before it on the way:
// memory is read and written all the time. For that a row is read once for both its moments, about
// the mean of its first STEP elements: no further from the row's mean than √(D / STEP) standard
// deviations, whatever the row, so that their difference loses log2(D / STEP) bits at worst.
template <class T, Update update, bool streamed>
GENTRON_AVX512 void forward_tokens_avx512(const T* __restrict x, const T* __restrict y,
                                          const float* __restrict gate,
                                          const float* __restrict scale,
                                          const float* __restrict shift, T* __restrict residual,
                                          T* __restrict out, float* __restrict stream,
                                          int64_t tokens, int64_t width, double eps) {
  using avx512::HALF;
  using avx512::load;
  using avx512::STEP;
  const auto updated = [&](int64_t i) GENTRON_AVX512 {
    if constexpr (update == Update::TOKENS)
      return _mm512_fmadd_ps(load(gate + i), load(y + i), load(x + i));
    if constexpr (update == Update::ROW) return _mm512_add_ps(load(gate + i), load(x + i));
    return load(x + i);
  };
  // Of the row before: its elements, which wait for a streamed residual in `stream`, and moments.
  const T* row = nullptr;
  T* kept = reinterpret_cast<T*>(stream);
  T* spare = reinterpret_cast<T*>(stream + width);
  __m512 mean = _mm512_setzero_ps(), rstd = mean;

  for (int64_t token = 0; token <= tokens; ++token) {
    const bool reads = token < tokens, writes = token > 0;
    __m512 pivot = _mm512_setzero_ps(), sum_a = pivot, sum_b = pivot;
    __m512 square_a = pivot, square_b = pivot;
    if (reads)
      pivot = _mm512_set1_ps(
          _mm512_reduce_add_ps(_mm512_add_ps(updated(0), updated(HALF))) / STEP);
    const auto read = [&](int64_t i) GENTRON_AVX512 {
      avx512::fetch_ahead(x + i, width);
      if constexpr (update == Update::TOKENS) avx512::fetch_ahead(y + i, width);
      __m512 a = updated(i), b = updated(i + HALF);
      if constexpr (update != Update::NONE)
        avx512::store<false>((streamed ? kept : residual) + i, a, b);
      a = _mm512_sub_ps(a, pivot);
      b = _mm512_sub_ps(b, pivot);
      sum_a = _mm512_add_ps(sum_a, a);
      sum_b = _mm512_add_ps(sum_b, b);
      square_a = _mm512_fmadd_ps(a, a, square_a);
      square_b = _mm512_fmadd_ps(b, b, square_b);
    };
    const auto modulated = [&](int64_t i, __m512 element) GENTRON_AVX512 {
      const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(element, mean), rstd);
      return _mm512_fmadd_ps(normed, load(scale + i), load(shift + i));
    };
    const auto write = [&](int64_t i) GENTRON_AVX512 {
      if constexpr (!streamed) avx512::fetch_ahead(out + i, width);
      __m512 a = load(row + i), b = load(row + i + HALF);
      if constexpr (update != Update::NONE && streamed)
        avx512::store<true>(residual - width + i, a, b);
      a = modulated(i, a);
      b = modulated(i + HALF, b);
      avx512::store<streamed>(out + i, a, b);
    };
    if (reads && writes) {
      for (int64_t i = 0; i < width; i += STEP) {
        read(i);
        write(i);
      }
    } else if (reads) {
      for (int64_t i = 0; i < width; i += STEP) read(i);
    } else {
      for (int64_t i = 0; i < width; i += STEP) write(i);
    }
    if (writes) out += width;
    if (!reads) break;

    const float away = _mm512_reduce_add_ps(_mm512_add_ps(sum_a, sum_b)) / width;
    const float square = _mm512_reduce_add_ps(_mm512_add_ps(square_a, square_b)) / width;
    const float difference = square - away * away;
    const float variance = difference < 0 ? 0 : difference;  // NaN stays NaN
    mean = _mm512_add_ps(pivot, _mm512_set1_ps(away));
    rstd = _mm512_set1_ps(1 / std::sqrt(variance + static_cast<float>(eps)));
    if constexpr (update == Update::NONE) {
      row = x;
    } else if constexpr (streamed) {
      row = kept;
      std::swap(kept, spare);
    } else {
      row = residual;
    }
    x += width;
    if constexpr (update == Update::TOKENS) y += width;
    if constexpr (update != Update::NONE) residual += width;
  }
  if constexpr (streamed) avx512::fence();
}
#endif

// The forward of the CPU at hand; `streamed` where the results are too large for the caches.
template <class T, Update update>
auto forward_kernel([[maybe_unused]] int64_t width, [[maybe_unused]] bool streamed) {
#ifdef GENTRON_HAS_AVX512
  if constexpr (!std::is_same_v<T, double>) {
    if (avx512::takes(width))
      return streamed ? forward_tokens_avx512<T, update, true>
                      : forward_tokens_avx512<T, update, false>;
  }
#endif
  return forward_tokens<T, update>;
}

// Where a token's gradients go; null where one is not wanted. Row gradients are added to.
template <class T>
struct Gradients {
  T* __restrict x;
  T* __restrict y;
  wide_t<T>* __restrict y_row;
  wide_t<T>* __restrict gate;
  wide_t<T>* __restrict shift;
  wide_t<T>* __restrict scale;
};

// Consecutive tokens that the same rows serve. `y` advances by `y_stride` elements a token.
template <class T>
GENTRON_CLONES void backward_tokens(const T* __restrict d_residual, const T* __restrict d_out,
                                    const T* __restrict residual, const T* __restrict y,
                                    int64_t y_stride, const wide_t<T>* __restrict gate,
                                    const wide_t<T>* __restrict scale, Gradients<T> grad,
                                    wide_t<T>* __restrict normed,
                                    wide_t<T>* __restrict d_stream, int64_t tokens,
                                    int64_t width, double eps) {
  using W = wide_t<T>;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t i = 0; i < width; ++i) {
      normed[i] = widen(residual[i]);
      d_stream[i] = widen(d_out[i]) * scale[i];
    }
    const W mean = sum(normed, width) / width, d_mean = sum(d_stream, width) / width;
    for (int64_t i = 0; i < width; ++i) normed[i] -= mean;
    const W rstd = 1 / std::sqrt(dot(normed, normed, width) / width + static_cast<W>(eps));
    const W slope = dot(normed, d_stream, width) / width * rstd;
    for (int64_t i = 0; i < width; ++i) {
      normed[i] *= rstd;
      d_stream[i] = rstd * (d_stream[i] - d_mean - normed[i] * slope);
    }
    if (d_residual) {
      for (int64_t i = 0; i < width; ++i) d_stream[i] += widen(d_residual[i]);
      d_residual += width;
    }
    if (grad.x) {
      for (int64_t i = 0; i < width; ++i) grad.x[i] = narrow<T>(d_stream[i]);
      grad.x += width;
    }
    if (grad.y) {
      for (int64_t i = 0; i < width; ++i) grad.y[i] = narrow<T>(gate[i] * d_stream[i]);
      grad.y += width;
    }
    if (grad.y_row)
      for (int64_t i = 0; i < width; ++i) grad.y_row[i] += gate[i] * d_stream[i];
    if (grad.gate) {
      for (int64_t i = 0; i < width; ++i) grad.gate[i] += widen(y[i]) * d_stream[i];
      y += y_stride;
    }
    if (grad.shift)
      for (int64_t i = 0; i < width; ++i) grad.shift[i] += widen(d_out[i]);
    if (grad.scale)
      for (int64_t i = 0; i < width; ++i) grad.scale[i] += widen(d_out[i]) * normed[i];
    residual += width;
    d_out += width;
  }
}

#ifdef GENTRON_HAS_AVX512
// backward_tokens in three passes: the sums, the sums about the mean, every gradient.
template <class T, bool streamed>
GENTRON_AVX512 void backward_tokens_avx512(const T* __restrict d_residual,
                                           const T* __restrict d_out, const T* __restrict residual,
                                           const T* __restrict y, int64_t y_stride,
                                           const float* __restrict gate,
                                           const float* __restrict scale, Gradients<T> grad,
                                           float* __restrict /*normed*/,
                                           float* __restrict /*d_stream*/, int64_t tokens,
                                           int64_t width, double eps) {
  using avx512::HALF;
  using avx512::load;
  const auto add = [](float* to, __m512 value) GENTRON_AVX512 {
    _mm512_storeu_ps(to, _mm512_add_ps(load(to), value));
  };
  for (int64_t token = 0; token < tokens; ++token) {
    const auto d_normed = [&](int64_t i) GENTRON_AVX512 {
      return _mm512_mul_ps(load(d_out + i), load(scale + i));
    };
    __m512 sum_a = _mm512_setzero_ps(), sum_b = sum_a, d_sum_a = sum_a, d_sum_b = sum_a;
    for (int64_t i = 0; i < width; i += avx512::STEP) {
      avx512::fetch_ahead(residual + i, width);
      avx512::fetch_ahead(d_out + i, width);
      if (d_residual) avx512::fetch_ahead(d_residual + i, width);
      if (grad.gate) avx512::fetch_ahead(y + i, y_stride);
      sum_a = _mm512_add_ps(sum_a, load(residual + i));
      sum_b = _mm512_add_ps(sum_b, load(residual + i + HALF));
      d_sum_a = _mm512_add_ps(d_sum_a, d_normed(i));
      d_sum_b = _mm512_add_ps(d_sum_b, d_normed(i + HALF));
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(sum_a, sum_b)) / width);
    const __m512 d_mean =
        _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(d_sum_a, d_sum_b)) / width);

    __m512 square_a = _mm512_setzero_ps(), square_b = square_a, dot_a = square_a, dot_b = square_a;
    for (int64_t i = 0; i < width; i += avx512::STEP) {
      const __m512 a = _mm512_sub_ps(load(residual + i), mean);
      const __m512 b = _mm512_sub_ps(load(residual + i + HALF), mean);
      square_a = _mm512_fmadd_ps(a, a, square_a);
      square_b = _mm512_fmadd_ps(b, b, square_b);
      dot_a = _mm512_fmadd_ps(a, d_normed(i), dot_a);
      dot_b = _mm512_fmadd_ps(b, d_normed(i + HALF), dot_b);
    }
    const float variance = _mm512_reduce_add_ps(_mm512_add_ps(square_a, square_b)) / width;
    const float inverse = 1 / std::sqrt(variance + static_cast<float>(eps));
    const __m512 rstd = _mm512_set1_ps(inverse);
    const __m512 slope = _mm512_set1_ps(
        _mm512_reduce_add_ps(_mm512_add_ps(dot_a, dot_b)) / width * inverse);

    // x's gradient at one half of a step; the rows' gradients on the way.
    const auto gradient = [&](int64_t i) GENTRON_AVX512 {
      const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load(residual + i), mean), rstd);
      __m512 d = _mm512_sub_ps(d_normed(i), d_mean);
      d = _mm512_mul_ps(rstd, _mm512_fnmadd_ps(normed, slope, d));
      if (d_residual) d = _mm512_add_ps(d, load(d_residual + i));
      if (grad.y_row) add(grad.y_row + i, _mm512_mul_ps(load(gate + i), d));
      if (grad.gate) add(grad.gate + i, _mm512_mul_ps(load(y + i), d));
      if (grad.shift) add(grad.shift + i, load(d_out + i));
      if (grad.scale) add(grad.scale + i, _mm512_mul_ps(load(d_out + i), normed));
      return d;
    };
    for (int64_t i = 0; i < width; i += avx512::STEP) {
      __m512 a = gradient(i), b = gradient(i + HALF);
      if (grad.y) {
        __m512 y_a = _mm512_mul_ps(load(gate + i), a);
        __m512 y_b = _mm512_mul_ps(load(gate + i + HALF), b);
        avx512::store<streamed>(grad.y + i, y_a, y_b);
      }
      if (grad.x) avx512::store<streamed>(grad.x + i, a, b);
    }
    residual += width;
    d_out += width;
    if (d_residual) d_residual += width;
    if (grad.x) grad.x += width;
    if (grad.y) grad.y += width;
    if (grad.gate) y += y_stride;
  }
  if constexpr (streamed) avx512::fence();
}
#endif

// The backward of the CPU at hand; `streamed` as for the forward.
template <class T>
auto backward_kernel([[maybe_unused]] int64_t width, [[maybe_unused]] bool streamed) {
#ifdef GENTRON_HAS_AVX512
  if constexpr (!std::is_same_v<T, double>) {
    if (avx512::takes(width))
      return streamed ? backward_tokens_avx512<T, true> : backward_tokens_avx512<T, false>;
  }
#endif
  return backward_tokens<T>;
}

int64_t token_count(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) > 0, "x must be (..., D), got ", x.sizes());
  return x.numel() / x.size(-1);
}

void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK_VALUE(tensor.sizes() == x.sizes() && tensor.scalar_type() == x.scalar_type() &&
                        tensor.is_contiguous(),
                    name, " must be dense and like x, ", x.scalar_type(), " ", x.sizes(), ", got ",
                    tensor.scalar_type(), " ", tensor.sizes());
}

template <class T>
void forward(const Tensor& x, const OptionalTensor& y, const Rows<T>& gate, const Rows<T>& shift,
             const Rows<T>& scale, Tensor& residual, Tensor& out, double eps) {
  const int64_t width = x.size(-1), tokens = token_count(x);
  const bool tokenwise = y && y->numel() == x.numel();
  const Rows<T> y_rows("y", tokenwise ? OptionalTensor() : y, {}, tokens, width, 0);
  const T* x_data = x.const_data_ptr<T>();
  const T* y_data = tokenwise ? y->const_data_ptr<T>() : nullptr;
  T* residual_data = y ? residual.mutable_data_ptr<T>() : nullptr;
  T* out_data = out.mutable_data_ptr<T>();
  const bool streamed = streams(out.nbytes(), {out_data, residual_data});
  at::parallel_for(0, tokens, grain(width), [&](int64_t begin, int64_t stop) {
    std::vector<wide_t<T>> stream(2 * width), update(width);
    Cursor<T> gates(gate, width), shifts(shift, width), scales(scale, width), ys(y_rows, width);
    for (int64_t token = begin, end; token < stop; token = end) {
      const bool moved = gates.move(token) | ys.move(token);
      shifts.move(token);
      scales.move(token);
      end = std::min({stop, gates.end(token), ys.end(token), shifts.end(token), scales.end(token)});
      const int64_t at = token * width;
      const auto run = [&](auto kernel, const wide_t<T>* gate_row) {
        kernel(x_data + at, y_data ? y_data + at : nullptr, gate_row, scales.row(), shifts.row(),
               residual_data ? residual_data + at : nullptr, out_data + at, stream.data(),
               end - token, width, eps);
      };
      if (!y) {
        run(forward_kernel<T, Update::NONE>(width, streamed), nullptr);
      } else if (tokenwise) {
        run(forward_kernel<T, Update::TOKENS>(width, streamed), gates.row());
      } else {
        if (moved) {
          std::copy_n(ys.row(), width, update.data());
          multiply_row(gates.row(), update.data(), width);
        }
        run(forward_kernel<T, Update::ROW>(width, streamed), update.data());
      }
    }
  });
}

template <class Function>
void dispatch(const Tensor& x, const Function& function) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return function(double());
    case at::kFloat:
      return function(float());
    case at::kBFloat16:
      return function(BFloat16());
    default:
      TORCH_CHECK_TYPE(false, "x must be fp64, fp32 or bf16, got ", x.scalar_type());
  }
}

Tensor layernorm_modulate(const Tensor& x, const OptionalTensor& shift,
                          const OptionalTensor& shift_index, const OptionalTensor& scale,
                          const OptionalTensor& scale_index, double eps) {
  const int64_t width = x.size(-1), tokens = token_count(x);
  check_like("x", x, x);
  Tensor out = at::empty_like(x), none;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(x, {}, Rows<T>("gate", {}, {}, tokens, width, 1),
               Rows<T>("shift", shift, shift_index, tokens, width, 0),
               Rows<T>("scale", scale, scale_index, tokens, width, 1, 1), none, out, eps);
  });
  return out;
}

std::tuple<Tensor, Tensor> residual_layernorm_modulate(
    const Tensor& x, const Tensor& y, const OptionalTensor& gate, const OptionalTensor& gate_index,
    const OptionalTensor& shift, const OptionalTensor& shift_index, const OptionalTensor& scale,
    const OptionalTensor& scale_index, double eps) {
  const int64_t width = x.size(-1), tokens = token_count(x);
  check_like("x", x, x);
  if (y.numel() == x.numel()) check_like("y", y, x);
  Tensor residual = at::empty_like(x), out = at::empty_like(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(x, y, Rows<T>("gate", gate, gate_index, tokens, width, 1),
               Rows<T>("shift", shift, shift_index, tokens, width, 0),
               Rows<T>("scale", scale, scale_index, tokens, width, 1, 1), residual, out, eps);
  });
  return {residual, out};
}

// One row gradient: a partial sum a chunk of tokens, then the sum of a row's chunks.
template <class W>
class RowGradient {
 public:
  RowGradient(int64_t rows, int64_t chunks, int64_t width, const Tensor& like) : rows_(rows) {
    const auto options = like.options().dtype(c10::CppTypeToScalarType<W>::value);
    partial_ = at::empty({rows > 0 ? chunks : 0, width}, options);
    data_ = rows > 0 ? partial_.template mutable_data_ptr<W>() : nullptr;
  }
  W* start(int64_t chunk) const {
    if (!data_) return nullptr;
    const int64_t width = partial_.size(1);
    std::fill_n(data_ + chunk * width, width, W(0));
    return data_ + chunk * width;
  }
  Tensor sum() const {
    if (rows_ == partial_.size(0) || rows_ == 0) return partial_;
    return partial_.view({rows_, partial_.size(0) / rows_, partial_.size(1)}).sum(1);
  }

 private:
  int64_t rows_;
  Tensor partial_;
  W* data_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& d_residual, const Tensor& d_out, const Tensor& residual,
    const OptionalTensor& y, const OptionalTensor& gate, const OptionalTensor& gate_index,
    const OptionalTensor& scale, const OptionalTensor& scale_index, double eps, bool dx,
    int64_t dy_rows, int64_t dgate_rows, int64_t dshift_rows, int64_t dscale_rows) {
  const int64_t width = residual.size(-1), tokens = token_count(residual);
  check_like("residual", residual, residual);
  check_like("d_out", d_out, residual);
  if (d_residual) check_like("d_residual", *d_residual, residual);
  const bool y_tokenwise = y && y->numel() == residual.numel();
  TORCH_CHECK_VALUE(!y || (y->is_contiguous() && y->scalar_type() == residual.scalar_type()),
                    "y must be dense and have the residual's dtype");
  TORCH_CHECK_VALUE(dgate_rows == 0 || y, "the gate's gradient needs y");

  const bool dy_tokenwise = dy_rows == tokens;
  const int64_t row_counts[] = {dy_tokenwise ? 0 : dy_rows, dgate_rows, dshift_rows, dscale_rows};
  Tensor dx_out = at::empty({0}, residual.options()), dy_out, dgate, dshift, dscale;
  if (dx) dx_out = at::empty_like(residual);
  dispatch(residual, [&](auto zero) {
    using T = decltype(zero);
    using W = wide_t<T>;
    if (tokens == 0) {  // of no tokens a table's index has no rows, which divide nothing
      const auto options = residual.options().dtype(c10::CppTypeToScalarType<W>::value);
      const auto zeros = [&](int64_t rows) { return at::zeros({rows, width}, options); };
      dy_out = dy_tokenwise ? at::empty_like(residual) : zeros(dy_rows);
      dgate = zeros(dgate_rows);
      dshift = zeros(dshift_rows);
      dscale = zeros(dscale_rows);
      return;
    }
    const Rows<T> gates("gate", gate, gate_index, tokens, width, 1);
    const Rows<T> scales("scale", scale, scale_index, tokens, width, 1, 1);
    const Rows<T> y_rows("y", y_tokenwise ? OptionalTensor() : y, {}, tokens, width, 0);

    // A chunk lies inside one row of every operand.
    int64_t rows = std::max({gates.count(), scales.count(), y_rows.count()});
    for (const int64_t count : row_counts) rows = std::max(rows, count);
    for (const int64_t count : {gates.count(), scales.count(), y_rows.count()})
      TORCH_CHECK_VALUE(rows % count == 0, "row counts must divide one another");
    for (const int64_t count : row_counts)
      TORCH_CHECK_VALUE(count >= 0 && (count == 0 || rows % count == 0),
                        "row counts must divide one another");
    TORCH_CHECK_VALUE(tokens % rows == 0, rows, " rows do not divide ", tokens, " tokens");
    const int64_t span = tokens / rows;
    const int64_t per_row = std::max<int64_t>(1, (span + CHUNK - 1) / CHUNK);
    const int64_t length = (span + per_row - 1) / per_row;
    const int64_t chunks = rows * per_row;

    const RowGradient<W> y_sum(row_counts[0], chunks, width, residual);
    const RowGradient<W> gate_sum(dgate_rows, chunks, width, residual);
    const RowGradient<W> shift_sum(dshift_rows, chunks, width, residual);
    const RowGradient<W> scale_sum(dscale_rows, chunks, width, residual);
    if (dy_tokenwise) dy_out = at::empty_like(residual);
    const T* d_residual_data = d_residual ? d_residual->const_data_ptr<T>() : nullptr;
    const T* d_out_data = d_out.const_data_ptr<T>();
    const T* residual_data = residual.const_data_ptr<T>();
    const T* y_data = y ? y->const_data_ptr<T>() : nullptr;
    T* dx_data = dx ? dx_out.mutable_data_ptr<T>() : nullptr;
    T* dy_data = dy_tokenwise ? dy_out.mutable_data_ptr<T>() : nullptr;
    const auto kernel = backward_kernel<T>(width, streams(residual.nbytes(), {dx_data, dy_data}));

    at::parallel_for(0, chunks, grain(length * width), [&](int64_t begin, int64_t stop) {
      std::vector<W> normed(width), d_stream(width);
      Cursor<T> gate_cursor(gates, width), scale_cursor(scales, width);
      for (int64_t chunk = begin; chunk < stop; ++chunk) {
        const int64_t row = chunk / per_row, first = chunk % per_row * length;
        const int64_t token = row * span + first;
        const int64_t count = std::max<int64_t>(0, std::min(length, span - first));
        Gradients<T> grad{dx_data ? dx_data + token * width : nullptr,
                          dy_data ? dy_data + token * width : nullptr,
                          y_sum.start(chunk),
                          gate_sum.start(chunk),
                          shift_sum.start(chunk),
                          scale_sum.start(chunk)};
        if (count == 0) continue;
        gate_cursor.move(token);
        scale_cursor.move(token);
        const T* y_at = nullptr;
        if (y) y_at = y_data + (y_tokenwise ? token : token / y_rows.span()) * width;
        kernel(d_residual_data ? d_residual_data + token * width : nullptr,
               d_out_data + token * width, residual_data + token * width, y_at,
               y_tokenwise ? width : 0, gate_cursor.row(), scale_cursor.row(), grad,
               normed.data(), d_stream.data(), count, width, eps);
      }
    });
    if (!dy_tokenwise) dy_out = y_sum.sum();
    dgate = gate_sum.sum();
    dshift = shift_sum.sum();
    dscale = scale_sum.sum();
  });
  return {dx_out, dy_out, dgate, dshift, dscale};
}

}  // namespace

TORCH_LIBRARY_IMPL(gentron, CPU, m) {
  m.impl("layernorm_modulate_cpu", layernorm_modulate);
  m.impl("residual_layernorm_modulate_cpu", residual_layernorm_modulate);
  m.impl("residual_layernorm_modulate_backward_cpu", backward);
}

}  // namespace gentron
