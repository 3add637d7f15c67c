// The files of a compiled sampler: the package itself, safetensors and .npy.
//
// A package is, in this order:
//   8 bytes   "GENTRON" and the format's number
//   8 bytes   the header's length, little endian
//   32 bytes  the header's SHA-256
//   header    JSON: {"metadata": {...}, "sections": {name: {"offset", "size", "sha256"}}}
//   sections  back to back up to the end of the file, offsets from the end of the header
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "json.h"

namespace gentron {

using Tensors = std::map<std::string, at::Tensor>;

// A package in memory. Every byte was compared with its checksum when it was read, and later
// changes to the file change nothing.
class Package {
 public:
  // std::invalid_argument, in one line, where there is no such file, it is no package, truncated,
  // altered, or not the one whose SHA-256 is `pinned` (64 digits, or empty for any).
  static Package read(const std::string& path, const std::string& pinned = "");

  // The header as it is written.
  const std::string& header() const { return text_; }
  const Json& metadata() const { return header_["metadata"]; }
  // The section's bytes, (size,) uint8.
  const at::Tensor& section(const std::string& name) const;
  // The section's SHA-256.
  const std::string& digest(const std::string& name) const;
  // A section of safetensors; the tensors share its memory, and keep it.
  Tensors tensors(const std::string& name) const;
  // Forget a section.
  void drop(const std::string& name);

 private:
  std::string text_;
  Json header_;
  std::map<std::string, at::Tensor> sections_;
};

// A safetensors file. std::invalid_argument where it is none.
Tensors read_safetensors(const std::string& path);

// std::invalid_argument where `write_npy` could not write.
void check_writable(const std::string& path);

// Write aside, in a file of this call's own, then rename: fp32 or uint8, contiguous.
void write_npy(const std::string& path, const at::Tensor& tensor);

}  // namespace gentron
