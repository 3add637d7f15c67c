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

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  static const auto onednn =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1),
                    "x must be (..., K) and weight (M, K), got ", x.sizes(), " and ",
                    weight.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), "weight must have x's dtype ",
                   x.scalar_type(), ", got ", weight.scalar_type());
  const bool known = x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
  if (onednn && known && x.numel() > 0) {
    static const auto typed = onednn->typed<Onednn>();
    return typed.call(x, weight, bias, gelu ? "gelu" : "none", Scalars(),
                      gelu ? std::optional<std::string_view>("tanh") : std::nullopt);
  }
  const Tensor out = at::linear(x, weight, bias);
  return gelu ? at::gelu(out, "tanh") : out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gentron, CPU, m) { m.impl("linear_cpu", linear); }

}  // namespace gentron
