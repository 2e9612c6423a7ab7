// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/split_schedule.h"
#include "cpu/cpu_kernels.h"

namespace dsa::cpu {
namespace {

// The longest of a request's rows, all of which one pass over its keys serves.
std::int64_t request_length(const TensorView& context_lens, std::int64_t request) {
  const std::int32_t* lens =
      context_lens.ptr<const std::int32_t>() + request * context_lens.stride(0);
  if (context_lens.ndim == 1) return *lens;
  std::int64_t longest = 0;
  for (std::int64_t j = 0; j < context_lens.size(1); ++j) {
    longest = std::max<std::int64_t>(longest, lens[j * context_lens.stride(1)]);
  }
  return longest;
}

}  // namespace

// `indices` (request ids) and block_kv do not change the schedule: rows are scheduled one by one,
// and a segment holds 256 keys whatever the page size.
Status paged_mqa_logits_metadata(const PagedMqaLogitsMetadataParams& params) {
  const std::int64_t num_requests = params.context_lens.size(0);
  std::vector<std::int64_t> prefix{0};
  prefix.reserve(static_cast<std::size_t>(num_requests) + 1);
  for (std::int64_t request = 0; request < num_requests; ++request) {
    prefix.push_back(prefix.back() + num_segments(request_length(params.context_lens, request)));
  }
  for (std::int64_t sm = 0; sm <= params.num_sms; ++sm) {
    const SegmentPosition begin =
        locate_segment(prefix.data(), num_requests, flat_begin(sm, params.num_sms, prefix.back()));
    std::int32_t* out = params.out.ptr<std::int32_t>() + sm * params.out.stride(0);
    out[0] = static_cast<std::int32_t>(begin.request);
    out[params.out.stride(1)] = static_cast<std::int32_t>(begin.segment);
  }
  return {};
}

}  // namespace dsa::cpu
