// What a compiled sampler says of itself, every value checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "json.h"
#include "package.h"

namespace gentron {

// Dtype and sides of a graph's tensor, each at least and at most so long.
struct TensorKind {
  at::ScalarType dtype;
  std::vector<std::pair<int64_t, int64_t>> sides;

  bool fits(const at::Tensor& tensor) const;
  // Whether every tensor of the other kind fits.
  bool takes(const TensorKind& other) const;
  std::string text() const;  // such as Float [1-16, 4, 8, 8]
};

// A graph's inputs and, behind them, its weights with their names in the file, in which "*" stands
// for the block's number.
struct GraphKind {
  bool is_per_block = false;
  std::vector<TensorKind> inputs;
  std::vector<std::pair<std::string, TensorKind>> weights;
};

// The fields are the metadata's own, which gentron_fast/compiled/exporter.py writes.
struct Metadata {
  // std::invalid_argument, in one line, where a value is missing, of another type, out of range, or
  // does not fit the others.
  static Metadata read(const Json& values);

  // The machine.
  std::string torch, made_for, machine, capability;
  std::vector<std::string> cpu_flags;

  // The model.
  int64_t depth = 0, width = 0, head_size = 0;
  bool cross_attention = false, pooled = false;
  bool distilled = false;  // guidance is an input: the prompt's branch gives the guided noise
  std::vector<std::string> encoders;
  std::map<std::string, int64_t> text_widths, max_tokens, vocabulary;  // by encoder
  at::ScalarType dtype = at::kFloat;
  bool whole = false;

  // The clips.
  std::vector<int64_t> frames, size, latent_shape;
  int64_t max_batch = 0;

  // The steps.
  int64_t steps = 0;
  std::vector<std::string> branches;  // fewest first
  std::vector<int64_t> modulation_chunks;  // by the number of clips, from 1 on
  double lambda_t = 0, lambda_m = 0, rescale = 0;
  // Of a distilled model: the lowest and the highest guidance of its training, by name.
  std::map<std::string, std::pair<double, double>> learnt;
  bool draws = false;
  // Of each branch's weight: constant, coefficients of lambda_t and lambda_m, (3, 3) fp64.
  at::Tensor coefficients;
  // (S,) int64, (S, 6) fp64, and (S, 2) fp32, or undefined.
  at::Tensor timesteps, rows, bounds;

  std::map<std::string, GraphKind> graphs;

  // With cross-attention only.
  const std::string& block_encoder(int64_t block) const {
    return encoders[block % encoders.size()];
  }
  void check_batch(int64_t batch) const;
  // A graph's weights, one list, or one a block; std::invalid_argument where one is missing or of
  // another kind than the graph was compiled for.
  std::vector<std::vector<at::Tensor>> weights_of(
      const std::string& graph, const Tensors& tensors) const;
};

}  // namespace gentron
