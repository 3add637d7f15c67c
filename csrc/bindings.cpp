// The runtime of compiled samplers, for Python: gentron_fast._runtime.

#include <ATen/ops/empty.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <exception>
#include <optional>
#include <stdexcept>
#include <string_view>

#include "runtime/noise.h"
#include "runtime/sampler.h"
#include "runtime/threads.h"

namespace py = pybind11;
using at::Tensor;
using gentron::Sampler;

namespace {

using OptionalTensor = std::optional<Tensor>;
using Encoded = std::tuple<Tensor, OptionalTensor, OptionalTensor>;
using Text = std::map<std::string, Encoded>;

gentron::TextCondition from_python(const Text& text) {
  gentron::TextCondition result;
  for (const auto& [encoder, encoded] : text) {
    const auto& [tokens, mask, pooled] = encoded;
    result[encoder] = {tokens, mask.value_or(Tensor()), pooled.value_or(Tensor())};
  }
  return result;
}

Text encode(const Sampler& sampler, const gentron::Tokens& tokens) {
  const py::gil_scoped_release release;
  Text result;
  for (auto& [encoder, encoded] : sampler.encode(tokens)) {
    result[encoder] = {encoded.tokens, encoded.mask, encoded.pooled};
  }
  return result;
}

Tensor sample(
    const Sampler& sampler, const Text& text, const Text& null_text, std::vector<uint64_t> seeds,
    const Tensor& lambda_t, const Tensor& lambda_m, const Tensor& rescale,
    const std::function<void(int64_t)>& on_step) {
  const py::gil_scoped_release release;
  const auto step_done = [&](int64_t step) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (on_step) on_step(step);
  };
  return sampler.sample(
      {from_python(text), from_python(null_text), std::move(seeds), lambda_t, lambda_m, rescale,
       step_done});
}

py::dict plan(
    const Sampler& sampler, const Tensor& lambda_t, const Tensor& lambda_m, const Tensor& rescale,
    int64_t batch) {
  const gentron::SamplingPlan made = sampler.plan(lambda_t, lambda_m, rescale, batch);
  py::dict result;
  result["weights"] = made.weights;
  result["rescale"] = made.rescale;
  result["branches"] = made.branches;
  result["conditions"] = made.conditions;
  result["chunk"] = made.chunk;
  if (made.guidance.defined()) result["guidance"] = made.guidance;
  result["step_weights"] = made.step_weights;
  result["step_rescale"] = made.step_rescale;
  result["step_coefficients"] = made.step_coefficients;
  result["step_bounds"] = made.step_bounds;
  return result;
}

py::bytes section(const Sampler& sampler, const std::string& name) {
  const Tensor& bytes = sampler.section(name);
  return {static_cast<const char*>(bytes.const_data_ptr()), static_cast<size_t>(bytes.numel())};
}

Tensor noise(uint64_t seed, uint32_t step, uint32_t sample, int64_t size) {
  Tensor drawn = at::empty({size}, at::kFloat);
  gentron::portable_noise(seed, step, sample, size, drawn.mutable_data_ptr<float>());
  return drawn;
}

}  // namespace

PYBIND11_MODULE(_runtime, m) {
  // A refusal may name what no UTF-8 is, in a file or a path.
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const std::invalid_argument& error) {
      const std::string_view words = error.what();
      const auto text = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
          words.data(), static_cast<Py_ssize_t>(words.size()), "backslashreplace"));
      PyErr_SetObject(PyExc_ValueError, text.ptr());
    }
  });
  m.def("portable_noise", &noise);
  m.def("available_cores", [](const std::string& root) { return gentron::available_cores(root); });
  m.def("settle_threads", [](const std::string& root) { gentron::settle_threads(root); });
  py::class_<Sampler>(m, "Sampler")
      .def_static("load", &Sampler::load, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("header", &Sampler::header)
      .def("section", &section)
      .def("encode", &encode)
      .def("plan", &plan)
      .def("sample", &sample)
      .def("decode", &Sampler::decode, py::call_guard<py::gil_scoped_release>());
}
