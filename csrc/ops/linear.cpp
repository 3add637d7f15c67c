// A linear layer and its GELU as one call of oneDNN, or as torch's own operators where PyTorch was
// built without it. An operator of ours, since compilers take oneDNN's for frozen weights alone.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string_view>

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
  const auto* layer = onednn(x.scalar_type());
  if (layer && x.numel() > 0)
    return layer->call(x, weight, bias, gelu ? "gelu" : "none", Scalars(),
                       gelu ? std::optional<std::string_view>("tanh") : std::nullopt);
  const Tensor out = at::linear(x, weight, bias);
  return gelu ? at::gelu(out, "tanh") : out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gentron, CPU, m) { m.impl("linear_cpu", linear); }

}  // namespace gentron
