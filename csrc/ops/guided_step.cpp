// Guidance and solver update in one pass over the latents, two with guidance rescale; the
// definition is in kernels/guided_step.py.
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
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace gentron {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlock = 1024;  // elements of a run
constexpr int64_t kBlocksPerThread = 16;
constexpr int kBranches = 3;
using Branches = std::array<OptionalTensor, kBranches>;
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

// Elements from `start` on of a plane of a branch; zeros where it is absent.
template <class E>
const E* elements(const OptionalTensor& branch, int64_t sample, int64_t channel, int64_t start) {
  if (!branch) return kZeros<E>;
  return address<E>(branch) + sample * branch->stride(0) + channel * branch->stride(1) + start;
}

// A sample's weights, 0 for what is absent.
Weights own_weights(const Tensor& weights, const Branches& branches, int64_t sample) {
  const double* table = weights.const_data_ptr<double>() + sample * kBranches;
  Weights own;
  for (int k = 0; k < kBranches; ++k) own[k] = branches[k] ? table[k] : 0;
  return own;
}

template <class T, class E>
void steps(
    const Tensor& latents, const Branches& branches, const Tensor& weights, const Tensor& row,
    const OptionalTensor& x0_previous, const OptionalTensor& noise, const OptionalTensor& d,
    Tensor& x_next, Tensor& x0) {
  const int64_t channels = latents.size(1), size = latents.size(2);
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  const double* rows = row.const_data_ptr<double>();
  const T* x = latents.const_data_ptr<T>();
  T *next = x_next.mutable_data_ptr<T>(), *clean = x0.mutable_data_ptr<T>();
  at::parallel_for(
      0, latents.size(0) * channels * blocks, kBlocksPerThread, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t plane = item / blocks, start = item % blocks * kBlock;
          const int64_t sample = plane / channels, channel = plane % channels;
          const int64_t offset = plane * size + start;
          const auto branch = [&](int index) {
            return elements<E>(branches[index], sample, channel, start);
          };
          Row coefficients;
          std::copy_n(rows + sample * coefficients.size(), coefficients.size(),
                      coefficients.begin());
          // A coefficient of 0 leaves its tensor unread: the first step has no x0 of a step before.
          const T* previous = coefficients[4] != 0 ? address<T>(x0_previous) : nullptr;
          const T* drawn = coefficients[5] != 0 ? address<T>(noise) : nullptr;
          if (!previous) coefficients[4] = 0;
          if (!drawn) coefficients[5] = 0;
          const T* own_d = drawn ? address<T>(d) : nullptr;
          const auto kernel = own_d ? step<true, T, E> : step<false, T, E>;
          const auto like_x = [&](const T* base) { return base ? base + offset : kZeros<T>; };
          kernel(std::min(kBlock, size - start), own_weights(weights, branches, sample),
                 coefficients, x + offset, branch(0), branch(1), branch(2), like_x(previous),
                 like_x(drawn), like_x(own_d), next + offset, clean + offset);
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

// The one dtype of the branches that are there, each of `sizes`.
at::ScalarType check_branches(const Branches& branches, at::IntArrayRef sizes) {
  std::optional<at::ScalarType> dtype;
  for (const OptionalTensor& branch : branches) {
    if (!branch) continue;
    dtype = dtype.value_or(branch->scalar_type());
    TORCH_CHECK_VALUE(
        branch->sizes() == sizes && branch->scalar_type() == *dtype &&
            (branch->stride(2) == 1 || branch->size(2) <= 1) && branch->is_cpu(),
        "every branch must be ", sizes, " with a contiguous last dimension and of one "
        "dtype on the CPU, got ", branch->sizes(), " ", branch->scalar_type());
  }
  TORCH_CHECK_VALUE(dtype, "a branch must be there, got none");
  return *dtype;
}

void check_weights(const Tensor& weights, int64_t batch) {
  TORCH_CHECK_VALUE(
      weights.sizes() == at::IntArrayRef({batch, kBranches}) && weights.is_cpu(),
      "weights must be (", batch, ", 3) on the CPU, got ", weights.sizes());
}

std::tuple<Tensor, Tensor> guided_step(
    const Tensor& latents, const OptionalTensor& null_still, const OptionalTensor& null_motion,
    const OptionalTensor& text, const Tensor& weights, const Tensor& row,
    const OptionalTensor& x0_previous, const OptionalTensor& noise, const OptionalTensor& d) {
  TORCH_CHECK_VALUE(
      latents.dim() == 3 && latents.is_contiguous(),
      "latents must be contiguous (B, C, P), got ", latents.sizes());
  check_weights(weights, latents.size(0));
  TORCH_CHECK_VALUE(
      (row.sizes() == at::IntArrayRef({6}) ||
       row.sizes() == at::IntArrayRef({latents.size(0), 6})) && row.is_cpu(),
      "row must be (6,) or (", latents.size(0), ", 6) on the CPU, got ", row.sizes());
  check_like(x0_previous, latents, "x0_previous");
  check_like(noise, latents, "noise");
  check_like(d, latents, "d");
  const Branches branches{null_still, null_motion, text};
  const at::ScalarType dtype = check_branches(branches, latents.sizes());
  Tensor x_next = at::empty_like(latents), x0 = at::empty_like(latents);
  const Tensor weights64 = weights.to(at::kDouble).contiguous();
  const Tensor row64 = row.to(at::kDouble).expand({latents.size(0), 6}).contiguous();
  AT_DISPATCH_FLOATING_TYPES(latents.scalar_type(), "guided_step_cpu", [&] {
    using T = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, dtype, "guided_step_cpu", [&] {
      steps<T, scalar_t>(
          latents, branches, weights64, row64, x0_previous, noise, d, x_next, x0);
    });
  });
  return {x_next, x0};
}

// Sums of the guided noise and of the text's branch, and of their squares.
using Moments = std::array<double, 4>;

// Adds those of `size` elements of one channel.
template <class E>
GENTRON_CLONES void add_moments(int64_t size, const Weights& weights,
                                const E* __restrict null_still, const E* __restrict null_motion,
                                const E* __restrict text, Moments& sums) {
  // Lanes of their own: one sum would wait for each addition before it.
  constexpr int64_t kLanes = 8;
  std::array<std::array<double, kLanes>, 4> lanes{};
  const auto add = [&](int64_t i, int64_t lane) {
    const double own = widen(text[i]);
    const double eps =
        weights[0] * widen(null_still[i]) + weights[1] * widen(null_motion[i]) + weights[2] * own;
    lanes[0][lane] += eps;
    lanes[1][lane] += eps * eps;
    lanes[2][lane] += own;
    lanes[3][lane] += own * own;
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (; i < size; ++i) add(i, 0);
  for (size_t k = 0; k < sums.size(); ++k) {
    for (const double part : lanes[k]) sums[k] += part;
  }
}

Tensor rescaled_weights(
    const OptionalTensor& null_still, const OptionalTensor& null_motion, const Tensor& text,
    const Tensor& weights, const Tensor& rescale) {
  TORCH_CHECK_VALUE(text.dim() == 3, "the text branch must be (B, C, P), got ", text.sizes());
  const Branches branches{null_still, null_motion, text};
  const at::ScalarType dtype = check_branches(branches, text.sizes());
  const int64_t batch = text.size(0), channels = text.size(1), size = text.size(2);
  check_weights(weights, batch);
  TORCH_CHECK_VALUE(
      rescale.sizes() == at::IntArrayRef({batch}) && rescale.is_cpu(), "rescale must be (", batch,
      ",) on the CPU, got ", rescale.sizes());
  Tensor result = weights.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).contiguous();
  const Tensor rescale64 = rescale.to(at::kDouble).contiguous();
  const double* share = rescale64.const_data_ptr<double>();
  std::vector<Moments> planes(batch * channels);
  const int64_t planes_per_thread = std::max<int64_t>(1, kBlocksPerThread * kBlock / (size + 1));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, dtype, "rescaled_weights_cpu", [&] {
    using E = scalar_t;
    at::parallel_for(
        0, batch * channels, planes_per_thread, [&](int64_t begin, int64_t end) {
          for (int64_t plane = begin; plane < end; ++plane) {
            const int64_t sample = plane / channels, channel = plane % channels;
            if (share[sample] == 0) continue;
            const Weights own = own_weights(result, branches, sample);
            for (int64_t start = 0; start < size; start += kBlock) {
              const auto branch = [&](int index) {
                return elements<E>(branches[index], sample, channel, start);
              };
              add_moments<E>(
                  std::min(kBlock, size - start), own, branch(0), branch(1), branch(2),
                  planes[plane]);
            }
          }
        });
  });
  double* scaled = result.mutable_data_ptr<double>();
  const auto count = static_cast<double>(channels * size);
  for (int64_t sample = 0; sample < batch; ++sample) {
    if (share[sample] == 0) continue;
    Moments sums{};
    for (int64_t channel = 0; channel < channels; ++channel) {
      const Moments& plane = planes[sample * channels + channel];
      for (size_t k = 0; k < sums.size(); ++k) sums[k] += plane[k];
    }
    // The mean is small beside the standard deviation, and fp64 has digits to spare.
    const double of_guided = std::max(sums[1] - sums[0] * sums[0] / count, 0.0);
    const double of_text = std::max(sums[3] - sums[2] * sums[2] / count, 0.0);
    const double ratio = of_guided > 0 ? std::sqrt(of_text / of_guided) : 1;
    for (int k = 0; k < kBranches; ++k) {
      scaled[sample * kBranches + k] *= share[sample] * ratio + (1 - share[sample]);
    }
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(gentron, CPU, m) {
  m.impl("guided_step_cpu", guided_step);
  m.impl("rescaled_weights_cpu", rescaled_weights);
}

}  // namespace gentron
