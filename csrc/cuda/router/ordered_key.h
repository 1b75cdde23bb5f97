// The key of an fp32 value: an unsigned integer, in the order of torch.topk, NaN greatest. Needs no
// CUDA toolkit.
#pragma once

#include <cstdint>

#include "cuda/common/operands.h"

namespace omni_moe::cuda {

inline constexpr uint32_t kKeyOfNegativeInf = 0x007fffffu;
inline constexpr uint32_t kKeyOfInf = 0xff800000u;
inline constexpr uint32_t kKeyOfNaN = 0xffc00000u;  // the quiet NaN; no key exceeds it

OMNI_MOE_HOST_DEVICE inline uint32_t ordered_key(float value) {
  // Adding +0 turns -0 into +0, so that the two compare equal.
  const float sum = value + 0.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &sum, sizeof(bits));
  const uint32_t key =
      bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return value != value ? kKeyOfNaN : key;
}

OMNI_MOE_HOST_DEVICE inline float value_of_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace omni_moe::cuda
