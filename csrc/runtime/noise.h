// Portable noise, the same as gentron_fast.diffusion.portable_noise draws; the rule is there.
#pragma once

#include <cstdint>

namespace gentron {

// Standard normal noise of one sample: `size` fp32 elements into `out`.
void portable_noise(uint64_t seed, uint32_t step, uint32_t sample, int64_t size, float* out);

}  // namespace gentron
