// SPDX-License-Identifier: Apache-2.0
// How the keys of a ragged batch are spread over CTAs, host and device. Each request is cut into
// segments of 256 keys; the segments of all requests, in order, form one flat list, of which each
// part (an SM) takes an equal run. A run may begin in one request and end in another.
#pragma once

#include <cstdint>

#include "dsa/host_device.h"

namespace dsa {

inline constexpr std::int64_t kSegmentKeys = 256;

struct SegmentPosition {
  std::int64_t request;
  std::int64_t segment;  // within the request
};

// Segments of a request of `length` keys; none for a length <= 0.
DSA_HOST_DEVICE constexpr std::int64_t num_segments(std::int64_t length) {
  return length <= 0 ? 0 : (length - 1) / kSegmentKeys + 1;
}

// floor(part * total / parts), the first flat segment of `part`, without the overflow of the
// product. 0 <= part <= parts, parts >= 1: part 0 begins at 0 and part `parts` at `total`.
DSA_HOST_DEVICE constexpr std::int64_t flat_begin(std::int64_t part, std::int64_t parts,
                                                  std::int64_t total) {
  return total / parts * part + total % parts * part / parts;
}

// Where flat segment `flat` (0 <= flat <= total) stands. prefix[b] is the number of segments
// before request b and prefix[num_requests] the total; requests without segments are passed over,
// and flat = total is (num_requests, 0).
DSA_HOST_DEVICE constexpr SegmentPosition locate_segment(const std::int64_t* prefix,
                                                         std::int64_t num_requests,
                                                         std::int64_t flat) {
  // Invariant: prefix[low] <= flat, and flat < prefix[high] where high is an entry.
  std::int64_t low = 0;
  std::int64_t high = num_requests + 1;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (prefix[middle] <= flat ? low : high) = middle;
  }
  return {low, flat - prefix[low]};
}

}  // namespace dsa
