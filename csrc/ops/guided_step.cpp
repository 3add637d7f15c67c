// Guidance and solver update in one pass over the latents; the definition is in
// kernels/guided_step.py.
//
// Everything is computed in fp64: at the noisiest step x0 = (x - sigma eps) / alpha divides the
// rounding of both by 0.006, and memory, not arithmetic, sets the time.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "cpu.h"

namespace gentron {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlock = 1024;  // elements of a run
constexpr int64_t kBlocksPerThread = 16;
constexpr int kBranches = 3;
using Weights = std::array<double, kBranches>;
using Row = std::array<double, 6>;  // alpha, sigma, a, b, c, d
// What absent tensors are read from, with coefficients of 0: one pass, whatever is there.
template <class T>
const T kZeros[kBlock] = {};

// `size` elements of one channel. Without d of its own the row's is taken.
template <bool own_d, class T, class E>
GENTRON_CLONES void step(int64_t size, const Weights& weights, const Row& row,
                         const T* __restrict x, const E* __restrict null_still,
                         const E* __restrict null_motion, const E* __restrict text,
                         const T* __restrict x0_previous, const T* __restrict noise,
                         const T* __restrict d, T* __restrict x_next, T* __restrict x0) {
  const double w0 = weights[0], w1 = weights[1], w2 = weights[2];
  const double inverse_alpha = 1 / row[0], sigma = row[1];
  const double a = row[2], b = row[3], c = row[4], row_d = row[5];
  for (int64_t i = 0; i < size; ++i) {
    const double eps = w0 * widen(null_still[i]) + w1 * widen(null_motion[i]) + w2 * widen(text[i]);
    const double clean = (x[i] - sigma * eps) * inverse_alpha;
    const double drawn = own_d ? static_cast<double>(d[i]) : row_d;
    x0[i] = static_cast<T>(clean);
    x_next[i] = static_cast<T>(a * x[i] + b * clean + c * x0_previous[i] + drawn * noise[i]);
  }
}

// The address of element 0 of what is there, else null.
template <class T>
const T* address(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

template <class T, class E>
void steps(
    const Tensor& latents, const std::array<OptionalTensor, kBranches>& branches,
    const Tensor& weights, const Tensor& row, const OptionalTensor& x0_previous,
    const OptionalTensor& noise, const OptionalTensor& d, Tensor& x_next, Tensor& x0) {
  const int64_t channels = latents.size(1), size = latents.size(2);
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  Row coefficients;
  std::copy_n(row.const_data_ptr<double>(), coefficients.size(), coefficients.begin());
  // A coefficient of 0 leaves its tensor unread: the first step has no x0 of a step before.
  const T* previous = coefficients[4] != 0 ? address<T>(x0_previous) : nullptr;
  const T* drawn = coefficients[5] != 0 ? address<T>(noise) : nullptr;
  if (!previous) coefficients[4] = 0;
  if (!drawn) coefficients[5] = 0;
  const T* own_d = drawn ? address<T>(d) : nullptr;
  const auto kernel = own_d ? step<true, T, E> : step<false, T, E>;
  const T* x = latents.const_data_ptr<T>();
  T *next = x_next.mutable_data_ptr<T>(), *clean = x0.mutable_data_ptr<T>();
  at::parallel_for(
      0, latents.size(0) * channels * blocks, kBlocksPerThread, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t plane = item / blocks, start = item % blocks * kBlock;
          const int64_t sample = plane / channels, channel = plane % channels;
          const int64_t offset = plane * size + start;
          const auto branch = [&](int index) {
            if (!branches[index]) return kZeros<E>;
            return address<E>(branches[index]) + sample * branches[index]->stride(0) +
                channel * branches[index]->stride(1) + start;
          };
          const auto like_x = [&](const T* base) { return base ? base + offset : kZeros<T>; };
          const double* table = weights.const_data_ptr<double>() + sample * kBranches;
          Weights own_weights;
          for (int k = 0; k < kBranches; ++k) own_weights[k] = branches[k] ? table[k] : 0;
          kernel(std::min(kBlock, size - start), own_weights, coefficients, x + offset, branch(0),
                 branch(1), branch(2), like_x(previous), like_x(drawn), like_x(own_d),
                 next + offset, clean + offset);
        }
      });
}

void check_like(const OptionalTensor& tensor, const Tensor& latents, const char* name) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(
      tensor->sizes() == latents.sizes() && tensor->scalar_type() == latents.scalar_type() &&
          tensor->is_contiguous() && tensor->is_cpu(),
      name, " must be like latents, ", latents.sizes(), " ", latents.scalar_type(),
      " and contiguous on the CPU; got ", tensor->sizes(), " ", tensor->scalar_type());
}

std::tuple<Tensor, Tensor> guided_step(
    const Tensor& latents, const OptionalTensor& null_still, const OptionalTensor& null_motion,
    const OptionalTensor& text, const Tensor& weights, const Tensor& row,
    const OptionalTensor& x0_previous, const OptionalTensor& noise, const OptionalTensor& d) {
  TORCH_CHECK_VALUE(
      latents.dim() == 3 && latents.is_contiguous(),
      "latents must be contiguous (B, C, P), got ", latents.sizes());
  TORCH_CHECK_VALUE(
      weights.sizes() == at::IntArrayRef({latents.size(0), kBranches}) && weights.is_cpu(),
      "weights must be (", latents.size(0), ", 3) on the CPU, got ", weights.sizes());
  TORCH_CHECK_VALUE(
      row.sizes() == at::IntArrayRef({6}) && row.is_cpu(), "row must be (6,) on the CPU, got ",
      row.sizes());
  check_like(x0_previous, latents, "x0_previous");
  check_like(noise, latents, "noise");
  check_like(d, latents, "d");
  const std::array<OptionalTensor, kBranches> branches{null_still, null_motion, text};
  std::optional<at::ScalarType> dtype;
  for (const OptionalTensor& branch : branches) {
    if (!branch) continue;
    dtype = dtype.value_or(branch->scalar_type());
    TORCH_CHECK_VALUE(
        branch->sizes() == latents.sizes() && branch->scalar_type() == *dtype &&
            (branch->stride(2) == 1 || branch->size(2) <= 1) && branch->is_cpu(),
        "every branch must be ", latents.sizes(), " with a contiguous last dimension and of one "
        "dtype on the CPU, got ", branch->sizes(), " ", branch->scalar_type());
  }
  TORCH_CHECK_VALUE(dtype, "a branch must be there, got none");
  Tensor x_next = at::empty_like(latents), x0 = at::empty_like(latents);
  const Tensor weights64 = weights.to(at::kDouble).contiguous();
  const Tensor row64 = row.to(at::kDouble).contiguous();
  AT_DISPATCH_FLOATING_TYPES(latents.scalar_type(), "guided_step_cpu", [&] {
    using T = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, *dtype, "guided_step_cpu", [&] {
      steps<T, scalar_t>(
          latents, branches, weights64, row64, x0_previous, noise, d, x_next, x0);
    });
  });
  return {x_next, x0};
}

}  // namespace

TORCH_LIBRARY_IMPL(gentron, CPU, m) { m.impl("guided_step_cpu", guided_step); }

}  // namespace gentron
