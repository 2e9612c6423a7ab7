// SPDX-License-Identifier: Apache-2.0
// Division by a number that the host knows before the launch: a multiplication and a shift.
#pragma once

#include <cstdint>

#include "dsa/host_device.h"

namespace dsa::cuda {

// Exact for every n >= 0, by magic = ceil(2^shift / d), shift = 63 + ceil(log2 d): magic * d
// exceeds 2^shift by less than 2^ceil(log2 d), so that n * magic / 2^shift is less than 1 / d above
// n / d.
class FastDivisor {
  __extension__ typedef unsigned __int128 Wide;

 public:
  FastDivisor() = default;
  // 0 is taken as 1, for empty tensors.
  explicit FastDivisor(std::int64_t divisor) : divisor_(divisor > 0 ? divisor : 1) {
    const auto d = static_cast<std::uint64_t>(divisor_);
    while ((std::uint64_t{1} << log2_) < d) ++log2_;
    magic_ = static_cast<std::uint64_t>(((Wide{1} << (63 + log2_)) + d - 1) / d);
  }

  DSA_HOST_DEVICE std::int64_t divisor() const { return divisor_; }
  DSA_HOST_DEVICE std::int64_t quotient(std::int64_t n) const {
    const std::uint64_t twice = static_cast<std::uint64_t>(n) << 1;
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(Wide{twice} * magic_ >> 64) >>
                                     log2_);
  }

 private:
  std::int64_t divisor_ = 1;
  std::uint64_t magic_ = std::uint64_t{1} << 63;
  std::int32_t log2_ = 0;  // of the divisor, rounded up
};

// The same in 32 bits, for n < 2^31 and divisors up to 2^31.
class FastDivisor31 {
 public:
  FastDivisor31() = default;
  explicit FastDivisor31(std::int64_t divisor)
      : divisor_(divisor > 0 ? static_cast<std::uint32_t>(divisor) : 1) {
    while ((std::uint32_t{1} << log2_) < divisor_) ++log2_;
    magic_ =
        static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + log2_)) + divisor_ - 1) / divisor_);
  }

  DSA_HOST_DEVICE std::uint32_t divisor() const { return divisor_; }
  DSA_HOST_DEVICE std::uint32_t quotient(std::uint32_t n) const {
#ifdef __CUDA_ARCH__
    return __umulhi(n << 1, magic_) >> log2_;
#else
    return static_cast<std::uint32_t>(std::uint64_t{n << 1} * magic_ >> 32) >> log2_;
#endif
  }

 private:
  std::uint32_t divisor_ = 1;
  std::uint32_t magic_ = std::uint32_t{1} << 31;
  std::uint32_t log2_ = 0;
};

}  // namespace dsa::cuda
