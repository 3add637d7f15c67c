// Loads a compiled sampler and runs it; libtorch only, no Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "metadata.h"
#include "package.h"

namespace gentron {

// One encoder's view of the text: tokens (B, S, W), mask (B, S) bool, pooled (B, P).
struct EncodedText {
  at::Tensor tokens, mask, pooled;
};

// By encoder, "clip" and "t5".
using TextCondition = std::map<std::string, EncodedText>;

// Token ids (B, L) int64 and mask (B, L) bool, by encoder.
using Tokens = std::map<std::string, std::pair<at::Tensor, at::Tensor>>;

struct Request {
  TextCondition text;       // of B prompts
  // Of one prompt; empty: the null text of the package. A distilled model takes none.
  TextCondition null_text;
  std::vector<uint64_t> seeds;  // one a clip
  // A number (), one a clip (B,), or a schedule (S, 1) or (S, B); undefined: the package's own.
  at::Tensor lambda_t, lambda_m, rescale;
  std::function<void(int64_t step)> on_step;  // behind each step; may throw to end the run
};

// What a run decides before its first step.
struct SamplingPlan {
  at::Tensor weights;  // of the three branches, (S, B, 3) fp64
  at::Tensor rescale;  // of the guided noise, (S, B) fp64
  std::vector<std::string> branches;  // of each step the set that runs, "1" for each branch in it
  // By set: which condition each sample of the stacked batch has; 0 the null text, 1 … the prompts.
  std::map<std::string, at::Tensor> conditions;
  int64_t chunk = 1;  // steps whose modulation rows are made at once
  at::Tensor guidance;  // of a distilled model: lambda_t and lambda_m of each condition, (S, 1 + B, 2)
  // A tensor a step on the device: what the step graphs take of the two above, of the solver and,
  // where the range is learned, of its bounds. Each its own: within a table they would not all
  // begin at a multiple of 16 bytes, and a graph would copy those that do not at every step.
  std::vector<at::Tensor> step_weights, step_rescale, step_coefficients, step_bounds;
};

// std::invalid_argument for scales or a batch that do not fit.
SamplingPlan make_plan(
    const Metadata& made, const at::Tensor& lambda_t, const at::Tensor& lambda_m,
    const at::Tensor& rescale, int64_t batch, const at::Device& device = at::kCPU);

// Every refusal is a std::invalid_argument of one line.
class Sampler {
 public:
  // pinned: the SHA-256 that the file must have, or empty. device: of the kind that the file was
  // made for, empty for its first. operators: the library of the C++ operators, empty where the
  // process has them already.
  static Sampler load(
      const std::string& path, const std::string& pinned, const std::string& device,
      const std::string& operators);
  Sampler(Sampler&&) noexcept;
  ~Sampler();

  const std::string& header() const;  // of the file, JSON
  const Metadata& metadata() const;
  const at::Tensor& section(const std::string& name) const;

  // Token ids → text; a package made with --whole only.
  TextCondition encode(const Tokens& tokens) const;
  SamplingPlan plan(const at::Tensor& lambda_t, const at::Tensor& lambda_m,
                    const at::Tensor& rescale, int64_t batch) const;
  // Noise of the seeds → latents (B, C, T, h, w) fp32.
  at::Tensor sample(const Request& request) const;
  // Latents → frames (B, T, H, W, 3) uint8 on the CPU; a package made with --whole only.
  at::Tensor decode(const at::Tensor& latents) const;

 private:
  struct Parts;
  explicit Sampler(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

}  // namespace gentron
