// SPDX-License-Identifier: Apache-2.0
// Division by a number that the host knows before the launch: a multiplication and a shift.
#pragma once

#include <cstdint>

#include "dsa/host_device.h"

namespace dsa::cuda {

// Exact for every n >= 0. Below 2^31 by magic = ceil(2^shift / d), shift = 31 + ceil(log2 d):
// magic * d exceeds 2^shift by less than d, so that n * magic / 2^shift is less than 1 / d above
// n / d. From there on by the division itself.
class FastDivisor {
 public:
  FastDivisor() = default;
  // 0 is taken as 1, for empty tensors.
  explicit FastDivisor(std::int64_t divisor) : divisor_(divisor > 0 ? divisor : 1) {
    if (divisor_ >= kMagicLimit) {  // every n below 2^31 gives 0
      magic_ = 0;
      return;
    }
    int bits = 0;
    while ((std::int64_t{1} << bits) < divisor_) ++bits;
    shift_ = 31 + bits;
    const auto unsigned_divisor = static_cast<std::uint64_t>(divisor_);
    magic_ = static_cast<std::uint32_t>(((std::uint64_t{1} << shift_) + unsigned_divisor - 1) /
                                        unsigned_divisor);
  }

  DSA_HOST_DEVICE std::int64_t divisor() const { return divisor_; }
  DSA_HOST_DEVICE std::int64_t quotient(std::int64_t n) const {
    if (n >= kMagicLimit) return n / divisor_;
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(n) * magic_ >> shift_);
  }

 private:
  static constexpr std::int64_t kMagicLimit = std::int64_t{1} << 31;

  std::int64_t divisor_ = 1;
  std::uint32_t magic_ = std::uint32_t{1} << 31;
  std::int32_t shift_ = 31;
};

}  // namespace dsa::cuda
