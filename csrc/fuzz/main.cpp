// gentron-fuzz: what the runtime does with files that may be anything, up to the graphs' code.
//
// Reads files from its standard input, each as 1 byte, 'p' for a package and 's' for safetensors,
// 8 bytes, the length, little endian, and its bytes; writes a line for each, what was refused, or
// "accepted". Anything but a refusal of one line ends it. tests/shared/hostile_files.py makes them.

#include <ATen/core/Tensor.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <iostream>
#include <stdexcept>
#include <string>

#include "runtime/sampler.h"

namespace {

void use(char kind, const std::string& path) {
  if (kind == 's') {
    gentron::read_safetensors(path);
    return;
  }
  const gentron::Package package = gentron::Package::read(path);
  const auto made = gentron::Metadata::read(package.metadata());
  const gentron::Tensors tensors = package.tensors("weights.safetensors");
  for (const auto& [name, graph] : made.graphs) made.weights_of(name, tensors);
  for (const int64_t batch : {int64_t{1}, made.max_batch}) {
    gentron::make_plan(made, {}, {}, {}, batch);
  }
  if (made.cross_attention) {
    for (int64_t block = 0; block < made.depth; ++block) made.block_encoder(block);
  }
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  const int file = memfd_create("fuzz", 0);
  const std::string path = "/proc/self/fd/" + std::to_string(file);
  std::string bytes;
  char kind = 0;
  while (std::cin.get(kind)) {
    uint64_t size = 0;
    std::cin.read(reinterpret_cast<char*>(&size), sizeof(size));
    bytes.resize(size);
    std::cin.read(bytes.data(), static_cast<std::streamsize>(size));
    if (!std::cin || ftruncate(file, 0) != 0 ||
        pwrite(file, bytes.data(), size, 0) != static_cast<ssize_t>(size)) {
      return 1;
    }
    try {
      use(kind, path);
      std::cout << "accepted" << std::endl;
    } catch (const std::invalid_argument& refusal) {
      const std::string line = refusal.what();
      if (line.find('\n') != std::string::npos) std::abort();
      std::cout << line << std::endl;
    }
  }
  return 0;
}
