// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace gentron {

class Sha256 {
 public:
  Sha256();
  void update(const void* data, size_t size);
  // The digest of everything given, 64 hexadecimal digits; nothing may be given after it.
  std::string hex();

 private:
  void compress(const uint8_t* block);

  std::array<uint32_t, 8> state_;
  uint8_t block_[64];
  size_t filled_ = 0;
  uint64_t total_ = 0;
};

}  // namespace gentron
