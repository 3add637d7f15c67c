#include "noise.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace gentron {
namespace {

using Words = std::array<uint32_t, 4>;

constexpr uint32_t kStream = 0;
constexpr float kTurn = 6.2831854820251465f;  // 2 π in fp32

Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    c = {
        static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
        static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

}  // namespace

void portable_noise(uint64_t seed, uint32_t step, uint32_t sample, int64_t size, float* out) {
  for (int64_t start = 0; start < size; start += 4) {
    const Words words = philox4x32(
        {static_cast<uint32_t>(start / 4), step, sample, kStream}, static_cast<uint32_t>(seed),
        static_cast<uint32_t>(seed >> 32));
    float values[4];
    for (int pair = 0; pair < 2; ++pair) {
      const float u = static_cast<float>((words[2 * pair] >> 8) + 1) * 0x1p-24f;
      const float v = static_cast<float>(words[2 * pair + 1] >> 8) * 0x1p-24f;
      const float logarithm = static_cast<float>(std::log(static_cast<double>(u)));
      const float radius = static_cast<float>(std::sqrt(static_cast<double>(-2 * logarithm)));
      const double angle = static_cast<double>(kTurn * v);
      values[2 * pair] = radius * static_cast<float>(std::cos(angle));
      values[2 * pair + 1] = radius * static_cast<float>(std::sin(angle));
    }
    std::copy_n(values, std::min<int64_t>(4, size - start), out + start);
  }
}

}  // namespace gentron
