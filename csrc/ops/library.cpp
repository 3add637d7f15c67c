// The schemas of all CPU operators; each is implemented in the file of its name.

#include <omp.h>
#include <torch/library.h>

TORCH_LIBRARY(gentron, m) {
  m.def(
      "layernorm_modulate_cpu(Tensor x, Tensor? shift, Tensor? shift_index, Tensor? scale, "
      "Tensor? scale_index, float eps) -> Tensor");
  m.def(
      "residual_layernorm_modulate_cpu(Tensor x, Tensor y, Tensor? gate, Tensor? gate_index, "
      "Tensor? shift, Tensor? shift_index, Tensor? scale, Tensor? scale_index, float eps) "
      "-> (Tensor, Tensor)");
  m.def(
      "residual_layernorm_modulate_backward_cpu(Tensor? d_residual, Tensor d_out, "
      "Tensor residual, Tensor? y, Tensor? gate, Tensor? gate_index, Tensor? scale, "
      "Tensor? scale_index, float eps, bool dx, SymInt dy_rows, SymInt dgate_rows, "
      "SymInt dshift_rows, SymInt dscale_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("temporal_attention_cpu(Tensor qkv, Tensor? motion_free) -> Tensor");
  m.def(
      "temporal_attention_backward_cpu(Tensor d_out, Tensor qkv, Tensor? motion_free) -> Tensor");
  m.def("linear_cpu(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor");
  m.def(
      "guided_step_cpu(Tensor latents, Tensor? null_still, Tensor? null_motion, Tensor? text, "
      "Tensor weights, Tensor row, Tensor? x0_previous, Tensor? noise, Tensor? d) "
      "-> (Tensor, Tensor)");
  m.def(
      "rescaled_weights_cpu(Tensor? null_still, Tensor? null_motion, Tensor text, Tensor weights, "
      "Tensor rescale) -> Tensor");
  // No operator: ends the OpenMP workers of the calling thread, and says whether it did.
  m.def("release_workers_cpu() -> bool", [] { return omp_pause_resource_all(omp_pause_soft) == 0; });
}
