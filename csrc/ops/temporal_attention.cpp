// Attention over the frames of a clip; the equations stand in kernels/temporal_attention.py.
//
// A head of a token is a problem of its own: its rows are gathered, widened, into scratch memory
// that stays in the first-level cache, multiplied there, and stored. Rows are padded with zeros to
// whole vectors and frames to whole groups, in the scratch memory only.

#include "avx512.h"
#include "cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

namespace gentron {
namespace {

constexpr int64_t GROUP = 4;  // frames that one pass of a product takes
constexpr int64_t GRAIN = 1 << 15;  // elements that are worth a thread

template <class W>
struct Vectors {
  typedef W Full __attribute__((vector_size(64)));
  typedef W Quad __attribute__((vector_size(GROUP * sizeof(W))));
  static constexpr int64_t LANES = sizeof(Full) / sizeof(W);
};
template <class W>
using Full = typename Vectors<W>::Full;
template <class W>
using Quad = typename Vectors<W>::Quad;

struct Shape {
  int64_t samples, frames, tokens, heads, size;

  int64_t width() const { return heads * size; }
  int64_t groups() const { return (frames + GROUP - 1) / GROUP * GROUP; }
  template <class W>
  int64_t vectors() const {
    return (size + Vectors<W>::LANES - 1) / Vectors<W>::LANES;
  }
};

// Zeroed memory of one thread: matrices of (frames, size), then tables of (frames, frames).
template <class W>
class Scratch {
 public:
  Scratch(const Shape& shape, int matrices, int tables)
      : matrix_(shape.groups() * shape.vectors<W>()),
        table_((shape.groups() * shape.groups() + Vectors<W>::LANES - 1) / Vectors<W>::LANES) {
    const size_t bytes = (matrices * matrix_ + tables * table_) * sizeof(Full<W>);
    memory_.reset(static_cast<Full<W>*>(std::aligned_alloc(sizeof(Full<W>), bytes)));
    TORCH_CHECK(memory_, "out of memory: ", bytes, " bytes of scratch");
    std::memset(static_cast<void*>(memory_.get()), 0, bytes);
  }
  Full<W>* matrix(int index) { return memory_.get() + index * matrix_; }
  // The tables lie behind the matrices.
  W* table(int matrices, int index) {
    return reinterpret_cast<W*>(matrix(matrices) + index * table_);
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  int64_t matrix_, table_;
  std::unique_ptr<Full<W>, Free> memory_;
};

template <class T>
GENTRON_INLINE void convert(const T* __restrict from, int64_t count, wide_t<T>* __restrict to) {
  for (int64_t d = 0; d < count; ++d) to[d] = widen(from[d]);
}
template <class T>
  requires(!std::is_same_v<T, wide_t<T>>)
GENTRON_INLINE void convert(const wide_t<T>* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t d = 0; d < count; ++d) to[d] = narrow<T>(from[d]);
}

// One row. Pieces of a known size become single instructions, where a loop would be a call.
template <class From, class To>
GENTRON_INLINE void convert_row(const From* from, int64_t size, To* to) {
  int64_t d = 0;
  for (; d + 16 <= size; d += 16) convert(from + d, 16, to + d);
  for (; d + 8 <= size; d += 8) convert(from + d, 8, to + d);
  for (; d < size; ++d) convert(from + d, 1, to + d);
}

// Frames lie so far apart that the CPU sees no pattern: while a token's rows are read, those of the
// next one, `ahead` elements further, are fetched.
template <class T>
GENTRON_INLINE void gather(
    const T* source, int64_t stride, int64_t ahead, int64_t frames, int64_t size, int64_t vectors,
    Full<wide_t<T>>* target) {
  for (int64_t t = 0; t < frames; ++t) {
    const T* row = source + t * stride;
    fetch(row + ahead, size);
    convert_row(row, size, reinterpret_cast<wide_t<T>*>(target + t * vectors));
  }
}

template <class T>
GENTRON_INLINE void scatter(
    const Full<wide_t<T>>* source, int64_t stride, int64_t frames, int64_t size, int64_t vectors,
    T* target) {
  for (int64_t t = 0; t < frames; ++t) {
    convert_row(
        reinterpret_cast<const wide_t<T>*>(source + t * vectors), size, target + t * stride);
  }
}

// A result, whose frames are `stride` elements apart and tokens `next`. Heads that fill whole lines
// of memory together, `span` elements of a row, wait for one another in `staged`, and are then
// stored past the caches; with a span of 0 each goes its own way.
template <class T>
struct Result {
  T* data;
  int64_t stride, next, span;
  T* staged;
};

// Stores one head of token n, `head` elements from the start of its rows. What is not stored past
// the caches goes to lines that were fetched with the token before.
template <class T>
GENTRON_INLINE void emit(
    const Full<wide_t<T>>* source, const Result<T>& result, int64_t n, int64_t head,
    int64_t frames, int64_t size, int64_t vectors) {
  T* rows = result.data + n * result.next;
#ifdef GENTRON_HAS_AVX512
  if (const int64_t span = result.span) {
    const int64_t first = head / span * span;
    scatter(source, span, frames, size, vectors, result.staged + head - first);
    if (head + size < first + span) return;
    for (int64_t t = 0; t < frames; ++t)
      avx512::stream(result.staged + t * span, span, rows + t * result.stride + first);
    return;
  }
#endif
  for (int64_t t = 0; t < frames; ++t) fetch(rows + result.next + t * result.stride + head, size);
  scatter(source, result.stride, frames, size, vectors, rows + head);
}

template <class W>
GENTRON_INLINE void fold(const Full<W>& x, Quad<W>& sum) {
  sum = __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
  if constexpr (Vectors<W>::LANES == 16) {
    sum += __builtin_shufflevector(x, x, 8, 9, 10, 11) +
        __builtin_shufflevector(x, x, 12, 13, 14, 15);
  }
}

// table[i][j] = a[i] · b[j]
template <class W>
GENTRON_INLINE void dots(
    const Full<W>* __restrict a, const Full<W>* __restrict b, int64_t frames, int64_t groups,
    int64_t vectors, W* __restrict table) {
  for (int64_t j = 0; j < groups; j += GROUP) {
    const Full<W>* b0 = b + j * vectors;
    const Full<W>* b1 = b0 + vectors;
    const Full<W>* b2 = b1 + vectors;
    const Full<W>* b3 = b2 + vectors;
    for (int64_t i = 0; i < frames; ++i) {
      const Full<W>* row = a + i * vectors;
      Full<W> s0 = {}, s1 = {}, s2 = {}, s3 = {};
      for (int64_t d = 0; d < vectors; ++d) {
        s0 += row[d] * b0[d];
        s1 += row[d] * b1[d];
        s2 += row[d] * b2[d];
        s3 += row[d] * b3[d];
      }
      Quad<W> q0, q1, q2, q3;
      fold<W>(s0, q0);
      fold<W>(s1, q1);
      fold<W>(s2, q2);
      fold<W>(s3, q3);
      const Quad<W> low = __builtin_shufflevector(q0, q1, 0, 4, 1, 5) +
          __builtin_shufflevector(q0, q1, 2, 6, 3, 7);
      const Quad<W> high = __builtin_shufflevector(q2, q3, 0, 4, 1, 5) +
          __builtin_shufflevector(q2, q3, 2, 6, 3, 7);
      *reinterpret_cast<Quad<W>*>(table + i * groups + j) =
          __builtin_shufflevector(low, high, 0, 1, 4, 5) +
          __builtin_shufflevector(low, high, 2, 3, 6, 7);
    }
  }
}

// out[i] = Σ_j table[i · row + j · column] · x[j]
template <class W>
GENTRON_INLINE void mix(
    const W* __restrict table, int64_t row, int64_t column, const Full<W>* __restrict x,
    int64_t frames, int64_t groups, int64_t vectors, Full<W>* __restrict out) {
  for (int64_t i = 0; i < groups; i += GROUP) {
    for (int64_t d = 0; d < vectors; ++d) {
      Full<W> s0 = {}, s1 = {}, s2 = {}, s3 = {};
      for (int64_t j = 0; j < frames; ++j) {
        const W* w = table + i * row + j * column;
        const Full<W> value = x[j * vectors + d];
        s0 += w[0] * value;
        s1 += w[row] * value;
        s2 += w[2 * row] * value;
        s3 += w[3 * row] * value;
      }
      Full<W>* target = out + i * vectors + d;
      target[0] = s0;
      target[vectors] = s1;
      target[2 * vectors] = s2;
      target[3 * vectors] = s3;
    }
  }
}

GENTRON_INLINE double exponential(double x) { return std::exp(x); }
// e^x for x ≤ 0 to 1 ulp or so, in operations that every clone vectorises: x = n · ln 2 + r with
// |r| ≤ ln 2 / 2, and Taylor's polynomial of r.
GENTRON_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const int32_t n = static_cast<int32_t>(x * 1.44269504f - 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.98412698e-4f;
  y = y * r + 1.38888889e-3f;
  y = y * r + 8.33333333e-3f;
  y = y * r + 4.16666667e-2f;
  y = y * r + 1.66666667e-1f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const uint32_t bits = (static_cast<uint32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return y * power;
}

template <class W>
GENTRON_INLINE W sum(const Quad<W>& x) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

// Along the rows of a table of dot products, each times scale.
template <class W>
GENTRON_INLINE void softmax(W* __restrict table, int64_t frames, int64_t groups, W scale) {
  const int64_t quads = groups / GROUP;
  for (int64_t i = 0; i < frames; ++i) {
    W* values = table + i * groups;
    // Padding takes no part; the exponential makes next to nothing of it.
    for (int64_t j = frames; j < groups; ++j) values[j] = -std::numeric_limits<W>::infinity();
    Quad<W>* row = reinterpret_cast<Quad<W>*>(values);
    Quad<W> top = row[0];
    for (int64_t j = 1; j < quads; ++j) top = row[j] > top ? row[j] : top;
    const W first = top[0] > top[1] ? top[0] : top[1], second = top[2] > top[3] ? top[2] : top[3];
    const W shift = first > second ? first : second;
    for (int64_t j = 0; j < quads; ++j) row[j] = (row[j] - shift) * scale;
  }
  constexpr int64_t LANES = Vectors<W>::LANES;
  const int64_t count = (frames * groups + LANES - 1) / LANES * LANES;
  for (int64_t x = 0; x < count; ++x) table[x] = exponential(table[x]);
  for (int64_t i = 0; i < frames; ++i) {
    Quad<W>* row = reinterpret_cast<Quad<W>*>(table + i * groups);
    Quad<W> total = row[0];
    for (int64_t j = 1; j < quads; ++j) total += row[j];
    const W inverse = 1 / sum<W>(total);
    for (int64_t j = 0; j < quads; ++j) row[j] *= inverse;
  }
}

// ds ← p · (ds − p · ds) · scale, row by row: the gradient of softmax(scale · scores).
template <class W>
GENTRON_INLINE void softmax_backward(
    const W* __restrict p, int64_t frames, int64_t groups, W scale, W* __restrict ds) {
  const int64_t quads = groups / GROUP;
  for (int64_t i = 0; i < frames; ++i) {
    const Quad<W>* weights = reinterpret_cast<const Quad<W>*>(p + i * groups);
    Quad<W>* row = reinterpret_cast<Quad<W>*>(ds + i * groups);
    Quad<W> total = {};
    for (int64_t j = 0; j < quads; ++j) total += weights[j] * row[j];
    const W mean = sum<W>(total);
    for (int64_t j = 0; j < quads; ++j) row[j] = weights[j] * (row[j] - mean) * scale;
  }
}

template <class T>
GENTRON_CLONES void forward(
    const T* qkv, const Shape& shape, int64_t begin, int64_t end, Scratch<wide_t<T>>& scratch,
    const Result<T>& out) {
  using W = wide_t<T>;
  const int64_t frames = shape.frames, groups = shape.groups(), size = shape.size;
  const int64_t vectors = shape.vectors<W>(), width = shape.width();
  const int64_t stride = shape.tokens * 3 * width;
  Full<W>*q = scratch.matrix(0), *k = scratch.matrix(1), *v = scratch.matrix(2);
  Full<W>* o = scratch.matrix(3);
  W* p = scratch.table(4, 0);
  const W scale = 1 / std::sqrt(static_cast<W>(size));
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t head = 0; head < width; head += size) {
      const T* source = qkv + n * 3 * width + head;
      gather(source, stride, 3 * width, frames, size, vectors, q);
      gather(source + width, stride, 3 * width, frames, size, vectors, k);
      gather(source + 2 * width, stride, 3 * width, frames, size, vectors, v);
      dots(q, k, frames, groups, vectors, p);
      softmax(p, frames, groups, scale);
      mix(p, groups, 1, v, frames, groups, vectors, o);
      emit(o, out, n, head, frames, size, vectors);
    }
  }
}

template <class T>
GENTRON_CLONES void backward(
    const T* d_out, const T* qkv, const Shape& shape, int64_t begin, int64_t end,
    Scratch<wide_t<T>>& scratch, const Result<T>& d_q, const Result<T>& d_k,
    const Result<T>& d_v) {
  using W = wide_t<T>;
  const int64_t frames = shape.frames, groups = shape.groups(), size = shape.size;
  const int64_t vectors = shape.vectors<W>(), width = shape.width();
  const int64_t stride = shape.tokens * 3 * width, out_stride = shape.tokens * width;
  Full<W>*q = scratch.matrix(0), *k = scratch.matrix(1), *v = scratch.matrix(2);
  Full<W>* d = scratch.matrix(3);
  Full<W>* result = scratch.matrix(4);
  W *p = scratch.table(5, 0), *ds = scratch.table(5, 1);
  const W scale = 1 / std::sqrt(static_cast<W>(size));
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t head = 0; head < width; head += size) {
      const int64_t offset = n * 3 * width + head;
      gather(qkv + offset, stride, 3 * width, frames, size, vectors, q);
      gather(qkv + offset + width, stride, 3 * width, frames, size, vectors, k);
      gather(qkv + offset + 2 * width, stride, 3 * width, frames, size, vectors, v);
      gather(d_out + n * width + head, out_stride, width, frames, size, vectors, d);
      dots(q, k, frames, groups, vectors, p);
      softmax(p, frames, groups, scale);
      dots(d, v, frames, groups, vectors, ds);
      softmax_backward(p, frames, groups, scale, ds);
      mix(ds, groups, 1, k, frames, groups, vectors, result);
      emit(result, d_q, n, head, frames, size, vectors);
      mix(ds, 1, groups, q, frames, groups, vectors, result);
      emit(result, d_k, n, head, frames, size, vectors);
      mix(p, 1, groups, d, frames, groups, vectors, result);
      emit(result, d_v, n, head, frames, size, vectors);
    }
  }
}

Shape checked(const at::Tensor& qkv, const std::optional<at::Tensor>& motion_free) {
  TORCH_CHECK_VALUE(
      qkv.dim() == 6 && qkv.size(3) == 3, "qkv must be (B, T, N, 3, H, Dh), got ", qkv.sizes());
  TORCH_CHECK_VALUE(qkv.device().is_cpu(), "qkv must be on the CPU, got ", qkv.device());
  if (motion_free) {
    TORCH_CHECK_VALUE(
        motion_free->dim() == 1 && motion_free->size(0) == qkv.size(0) &&
            motion_free->scalar_type() == at::kBool && motion_free->device().is_cpu(),
        "motion_free must be a bool tensor of shape (", qkv.size(0), ",) on the CPU, got ",
        motion_free->scalar_type(), " ", motion_free->sizes(), " on ", motion_free->device());
  }
  return {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(4), qkv.size(5)};
}

// What of a row its heads fill together, in whole lines, where a result of so many bytes is stored
// past the caches; else 0.
template <class T>
int64_t streamed_span([[maybe_unused]] const Shape& shape, [[maybe_unused]] const at::Tensor& out) {
#ifdef GENTRON_HAS_AVX512
  const int64_t span = std::lcm(shape.size, LINE / static_cast<int64_t>(sizeof(T)));
  if (avx512::available() && streams(out.nbytes(), {out.const_data_ptr()}) &&
      shape.width() % span == 0)
    return span;
#endif
  return 0;
}

// Calls attend(sample, begin, end, scratch) or identity(sample, begin, end) on ranges of the
// tokens of a sample, by its flag.
template <class W, class Attend, class Identity>
void for_tokens(
    const Shape& shape, const std::optional<at::Tensor>& motion_free, int matrices, int tables,
    const Attend& attend, const Identity& identity) {
  const at::Tensor flags = motion_free ? motion_free->contiguous() : at::Tensor();
  const bool* flag = motion_free ? flags.const_data_ptr<bool>() : nullptr;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (shape.frames * shape.width()));
  at::parallel_for(0, shape.samples * shape.tokens, grain, [&](int64_t begin, int64_t end) {
    Scratch<W> scratch(shape, matrices, tables);
    while (begin < end) {
      const int64_t sample = begin / shape.tokens, first = begin % shape.tokens;
      const int64_t last = std::min(shape.tokens, first + end - begin);
      if (flag && flag[sample]) {
        identity(sample, first, last);
      } else {
        attend(sample, first, last, scratch);
      }
      begin += last - first;
    }
#ifdef GENTRON_HAS_AVX512
    avx512::fence();
#endif
  });
}

at::Tensor temporal_attention(
    const at::Tensor& qkv, const std::optional<at::Tensor>& motion_free) {
  const Shape shape = checked(qkv, motion_free);
  const at::Tensor source = qkv.contiguous();
  at::Tensor out =
      at::empty({shape.samples, shape.frames, shape.tokens, shape.width()}, qkv.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND(
      at::kBFloat16, qkv.scalar_type(), "temporal_attention_cpu", [&] {
        const scalar_t* from = source.const_data_ptr<scalar_t>();
        scalar_t* to = out.mutable_data_ptr<scalar_t>();
        const int64_t width = shape.width(), rows = shape.frames * shape.tokens;
        const int64_t span = streamed_span<scalar_t>(shape, out);
        for_tokens<wide_t<scalar_t>>(
            shape, motion_free, 4, 1,
            [&](int64_t sample, int64_t begin, int64_t end, auto& scratch) {
              std::vector<scalar_t> staged(shape.frames * span);
              forward<scalar_t>(
                  from + sample * rows * 3 * width, shape, begin, end, scratch,
                  {to + sample * rows * width, shape.tokens * width, width, span, staged.data()});
            },
            [&](int64_t sample, int64_t begin, int64_t end) {
              for (int64_t t = 0; t < shape.frames; ++t) {
                for (int64_t n = begin; n < end; ++n) {
                  const int64_t row = sample * rows + t * shape.tokens + n;
                  std::memcpy(
                      to + row * width, from + (row * 3 + 2) * width, width * sizeof(scalar_t));
                }
              }
            });
      });
  return out;
}

at::Tensor temporal_attention_backward(
    const at::Tensor& d_out, const at::Tensor& qkv, const std::optional<at::Tensor>& motion_free) {
  const Shape shape = checked(qkv, motion_free);
  TORCH_CHECK_VALUE(
      d_out.sizes() ==
              at::IntArrayRef({shape.samples, shape.frames, shape.tokens, shape.width()}) &&
          d_out.scalar_type() == qkv.scalar_type() && d_out.device() == qkv.device(),
      "d_out must be (B, T, N, H · Dh) of qkv's dtype on its device, got ", d_out.scalar_type(),
      " ", d_out.sizes(), " on ", d_out.device());
  const at::Tensor source = qkv.contiguous(), gradient = d_out.contiguous();
  at::Tensor d_qkv = at::empty_like(source);
  if (d_qkv.numel() == 0) return d_qkv;
  AT_DISPATCH_FLOATING_TYPES_AND(
      at::kBFloat16, qkv.scalar_type(), "temporal_attention_backward_cpu", [&] {
        const scalar_t* from = source.const_data_ptr<scalar_t>();
        const scalar_t* d = gradient.const_data_ptr<scalar_t>();
        scalar_t* to = d_qkv.mutable_data_ptr<scalar_t>();
        const int64_t width = shape.width(), rows = shape.frames * shape.tokens;
        const int64_t span = streamed_span<scalar_t>(shape, d_qkv);
        for_tokens<wide_t<scalar_t>>(
            shape, motion_free, 5, 2,
            [&](int64_t sample, int64_t begin, int64_t end, auto& scratch) {
              std::vector<scalar_t> staged(3 * shape.frames * span);
              const auto part = [&](int64_t index) -> Result<scalar_t> {
                return {
                    to + sample * rows * 3 * width + index * width, shape.tokens * 3 * width,
                    3 * width, span, staged.data() + index * shape.frames * span};
              };
              backward(
                  d + sample * rows * width, from + sample * rows * 3 * width, shape, begin, end,
                  scratch, part(0), part(1), part(2));
            },
            [&](int64_t sample, int64_t begin, int64_t end) {
              for (int64_t t = 0; t < shape.frames; ++t) {
                for (int64_t n = begin; n < end; ++n) {
                  const int64_t row = sample * rows + t * shape.tokens + n;
                  std::fill_n(to + row * 3 * width, 2 * width, scalar_t(0));
                  std::memcpy(
                      to + (row * 3 + 2) * width, d + row * width, width * sizeof(scalar_t));
                }
              }
            });
      });
  return d_qkv;
}

}  // namespace

TORCH_LIBRARY_IMPL(gentron, CPU, m) {
  m.impl("temporal_attention_cpu", &temporal_attention);
  m.impl("temporal_attention_backward_cpu", &temporal_attention_backward);
}

}  // namespace gentron
