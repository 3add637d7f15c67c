// A linear layer and its GELU as one call of oneDNN, or as torch's own operators where PyTorch was
// built without it; for small weights in bf16 as products of our own where the CPU has AMX. An
// operator of ours, since compilers take oneDNN's for frozen weights only and it has no gradient.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "amx.h"

namespace gentron {
namespace {

using at::Tensor;

using Scalars = c10::List<std::optional<at::Scalar>>;
using Onednn = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                      Scalars, std::optional<std::string_view>);

std::optional<c10::OperatorHandle> find(const char* name) {
  return c10::Dispatcher::singleton().findSchema({name, ""});
}

// oneDNN's linear layer, where PyTorch has it and the CPU computes in x's dtype.
const c10::TypedOperatorHandle<Onednn>* onednn(at::ScalarType dtype) {
  using Typed = c10::TypedOperatorHandle<Onednn>;
  static const auto layer = [] {
    const auto found = find("mkldnn::_linear_pointwise");
    return found ? std::optional<Typed>(found->typed<Onednn>()) : std::nullopt;
  }();
  static const bool bfloat16 = [] {
    const auto supported = find("mkldnn::_is_mkldnn_bf16_supported");
    return supported && supported->typed<bool()>().call();
  }();
  const bool known = dtype == at::kFloat || (dtype == at::kBFloat16 && bfloat16);
  return layer && known ? &*layer : nullptr;
}

#ifdef GENTRON_HAS_AVX512
// Larger weights are oneDNN's: the second-level cache does not hold them, and they pay for packing.
constexpr int64_t SMALL = 1 << 20;  // bytes

bool takes_amx(const Tensor& x, const Tensor& weight) {
  const int64_t channels = weight.size(1);
  return x.scalar_type() == at::kBFloat16 && channels > 0 && channels % amx::CHANNELS == 0 &&
         weight.stride(1) == 1 && static_cast<int64_t>(weight.nbytes()) <= SMALL &&
         weight.size(0) > 0 && x.numel() / channels >= amx::TOKENS * at::get_num_threads() &&
         amx::available();
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

Tensor linear_amx(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  bool gelu) {
  const int64_t channels = weight.size(1), outputs = weight.size(0), stride = weight.stride(0);
  const Tensor rows = x.contiguous();
  const int64_t tokens = rows.numel() / channels;
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor out = at::empty(sizes, x.options());
  std::vector<float> offset((outputs + amx::CHANNELS - 1) / amx::CHANNELS * amx::CHANNELS);
  if (bias) {
    const auto* data = bias->const_data_ptr<at::BFloat16>();
    for (int64_t n = 0; n < outputs; ++n) offset[n] = widen(data[n * bias->stride(0)]);
  }
  const auto* from = rows.const_data_ptr<at::BFloat16>();
  const auto* weights = weight.const_data_ptr<at::BFloat16>();
  auto* to = out.mutable_data_ptr<at::BFloat16>();
  const auto block = gelu ? amx::linear_block<true> : amx::linear_block<false>;
  at::parallel_for(0, (tokens + amx::TOKENS - 1) / amx::TOKENS, 1, [&](int64_t begin, int64_t end) {
    const size_t bytes = amx::TOKENS * channels * sizeof(at::BFloat16);
    const std::unique_ptr<uint32_t, Free> tiles(
        static_cast<uint32_t*>(std::aligned_alloc(LINE, bytes)));
    TORCH_CHECK(tiles, "out of memory: ", bytes, " bytes of scratch");
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * amx::TOKENS, count = std::min(amx::TOKENS, tokens - first);
      amx::pack(from + first * channels, count, channels, tiles.get());
      block(tiles.get(), count, weights, stride, offset.data(), channels, outputs,
            to + first * outputs);
    }
  });
  return out;
}
#endif

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1),
                    "x must be (..., K) and weight (M, K), got ", x.sizes(), " and ",
                    weight.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), "weight must have x's dtype ",
                   x.scalar_type(), ", got ", weight.scalar_type());
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be (",
                      weight.size(0), ",), got ", bias->sizes());
    TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), "bias must have x's dtype ",
                     x.scalar_type(), ", got ", bias->scalar_type());
  }
#ifdef GENTRON_HAS_AVX512
  if (takes_amx(x, weight)) return linear_amx(x, weight, bias, gelu);
#endif
  const auto* layer = onednn(x.scalar_type());
  if (layer && x.numel() > 0)
    return layer->call(x, weight, bias, gelu ? "gelu" : "none", Scalars(),
                       gelu ? std::optional<std::string_view>("tanh") : std::nullopt);
  const Tensor out = at::linear(x, weight, bias);
  return gelu ? at::gelu(out, "tanh") : out;
}

// The operator without its gradient, by its name, so that a compiler sees one operator here too.
Tensor call(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  static const auto layer =
      find("gentron::linear_cpu")
          ->typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, bool)>();
  const at::AutoDispatchBelowAutograd below;
  return layer.call(x, weight, bias, gelu);
}

// Registered from Python, a gradient would cost every call of inference a turn through Python.
class Gradient : public torch::autograd::Function<Gradient> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const Tensor& weight, const std::optional<Tensor>& bias) {
    context->save_for_backward({x, weight});
    context->saved_data["bias"] = bias.has_value();
    return call(x, weight, bias, false);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const Tensor &grad = gradients[0], &x = saved[0], &weight = saved[1];
    const Tensor rows = grad.reshape_symint({-1, grad.sym_size(-1)});
    Tensor dx, dweight, dbias;
    if (context->needs_input_grad(0)) {
      // Where a gradient of the gradient is wanted, torch's product brings one.
      dx = at::GradMode::is_enabled() ? at::matmul(grad, weight)
                                      : call(grad, weight.t(), std::nullopt, false);
    }
    if (context->needs_input_grad(1))  // here MKL is the faster of the two
      dweight = at::mm(rows.t(), x.reshape_symint({-1, x.sym_size(-1)}));
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) dbias = rows.sum(0);
    return {dx, dweight, dbias};
  }
};

Tensor differentiable(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      bool gelu) {
  // A forward-mode gradient is not left out silently: Function says that it has none.
  const auto wants = [](const Tensor& t) { return t.requires_grad() || t._fw_grad(0).defined(); };
  const bool wanted = wants(x) || wants(weight) || (bias && wants(*bias));
  if (!at::GradMode::is_enabled() || !wanted) return call(x, weight, bias, gelu);
  const Tensor out = Gradient::apply(x, weight, bias);
  return gelu ? at::gelu(out, "tanh") : out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gentron, CPU, m) { m.impl("linear_cpu", linear); }
TORCH_LIBRARY_IMPL(gentron, Autograd, m) { m.impl("linear_cpu", differentiable); }

}  // namespace gentron
