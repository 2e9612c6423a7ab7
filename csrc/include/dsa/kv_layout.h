// SPDX-License-Identifier: Apache-2.0
// Byte layouts of the paged caches. The ONLY place that writes cache byte offsets; host and device.
// Pictures: docs/kv_cache_layout.md.
#pragma once

#include <cstdint>

#include "dsa/host_device.h"

namespace dsa {

// Indexer key page: page_size * D e4m3 bytes token by token, then page_size fp32 scales.
// The page's declared per-token width D + 4 is nominal.
struct IndexerLayout {
  std::int64_t head_dim;   // D
  std::int64_t page_size;  // tokens

  static constexpr std::int64_t kScaleBytes = 4;
  static constexpr std::int64_t kPageStrideAlign = 4;  // bytes: the scales are read as fp32

  DSA_HOST_DEVICE constexpr std::int64_t page_bytes() const {
    return page_size * (head_dim + kScaleBytes);
  }
  DSA_HOST_DEVICE constexpr std::int64_t values(std::int64_t token) const {
    return token * head_dim;
  }
  DSA_HOST_DEVICE constexpr std::int64_t scale(std::int64_t token) const {
    return page_size * head_dim + token * kScaleBytes;
  }
};

// MLA V3.2 FP8 row, 656 bytes a token: 512 e4m3 | 4 fp32 scales (one for 128 values) | 64 bf16
// RoPE.
struct MlaV32Layout {
  static constexpr std::int64_t kDimNope = 512;
  static constexpr std::int64_t kDimRope = 64;
  static constexpr std::int64_t kDim = kDimNope + kDimRope;
  static constexpr std::int64_t kDimV = 512;
  static constexpr std::int64_t kGroup = 128;
  static constexpr std::int64_t kNumScales = kDimNope / kGroup;
  static constexpr std::int64_t kTokenBytes = 656;
  static constexpr std::int64_t kScaleOffset = kDimNope;
  static constexpr std::int64_t kRopeOffset = kScaleOffset + kNumScales * 4;
  static_assert(kRopeOffset + kDimRope * 2 == kTokenBytes);

  DSA_HOST_DEVICE static constexpr std::int64_t values(std::int64_t token) {
    return token * kTokenBytes;
  }
  DSA_HOST_DEVICE static constexpr std::int64_t scales(std::int64_t token) {
    return token * kTokenBytes + kScaleOffset;
  }
  DSA_HOST_DEVICE static constexpr std::int64_t rope(std::int64_t token) {
    return token * kTokenBytes + kRopeOffset;
  }
};

// MLA V4 FP8, 584 bytes a token nominal, two planes a page: page_size * 576 bytes (448 e4m3 | 64
// bf16 RoPE), then page_size * 8 bytes (7 ue8m0 scales, one for 64 values | 1 pad byte). V is all
// 512 values.
struct MlaV4Layout {
  std::int64_t page_size;  // tokens

  static constexpr std::int64_t kDimNope = 448;
  static constexpr std::int64_t kDimRope = 64;
  static constexpr std::int64_t kDim = kDimNope + kDimRope;
  static constexpr std::int64_t kDimV = kDim;
  static constexpr std::int64_t kGroup = 64;
  static constexpr std::int64_t kNumScales = kDimNope / kGroup;
  static constexpr std::int64_t kTokenBytes = 584;
  static constexpr std::int64_t kDataBytes = kDimNope + kDimRope * 2;  // first plane
  static constexpr std::int64_t kScaleBytes = 8;                       // second plane
  static constexpr std::int64_t kPageStrideAlign = 576;                // what writers pad a page to
  static_assert(kDataBytes + kScaleBytes == kTokenBytes);

  DSA_HOST_DEVICE static constexpr std::int64_t values(std::int64_t token) {
    return token * kDataBytes;
  }
  DSA_HOST_DEVICE static constexpr std::int64_t rope(std::int64_t token) {
    return token * kDataBytes + kDimNope;
  }
  DSA_HOST_DEVICE constexpr std::int64_t scales(std::int64_t token) const {
    return page_size * kDataBytes + token * kScaleBytes;
  }
};

}  // namespace dsa
