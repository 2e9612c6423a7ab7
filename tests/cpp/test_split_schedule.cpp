// SPDX-License-Identifier: Apache-2.0
#include "core/split_schedule.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/cpu_kernels.h"
#include "view.h"

namespace dsa {
namespace {

static_assert(num_segments(0) == 0 && num_segments(1) == 1 && num_segments(256) == 1 &&
              num_segments(257) == 2);
static_assert(flat_begin(0, 3, 10) == 0 && flat_begin(1, 3, 10) == 3 && flat_begin(3, 3, 10) == 10);

std::vector<std::int64_t> prefix_of(const std::vector<std::int64_t>& lengths) {
  std::vector<std::int64_t> prefix{0};
  for (const std::int64_t length : lengths) prefix.push_back(prefix.back() + num_segments(length));
  return prefix;
}

TEST(SplitSchedule, NoSegmentsForLengthsThatAreNotPositive) {
  EXPECT_EQ(num_segments(-1), 0);
  EXPECT_EQ(num_segments(std::numeric_limits<std::int32_t>::min()), 0);
  EXPECT_EQ(num_segments(std::numeric_limits<std::int32_t>::max()), std::int64_t{1} << 23);
}

TEST(SplitSchedule, PartsAreEvenAndCoverEverySegmentOnce) {
  for (std::int64_t parts = 1; parts <= 20; ++parts) {
    for (std::int64_t total = 0; total <= 100; ++total) {
      EXPECT_EQ(flat_begin(0, parts, total), 0);
      EXPECT_EQ(flat_begin(parts, parts, total), total);
      for (std::int64_t part = 0; part < parts; ++part) {
        const std::int64_t begin = flat_begin(part, parts, total);
        const std::int64_t size = flat_begin(part + 1, parts, total) - begin;
        EXPECT_EQ(begin, part * total / parts);
        EXPECT_GE(size, total / parts);
        EXPECT_LE(size, total / parts + 1);
      }
    }
  }
}

TEST(SplitSchedule, DoesNotOverflow) {
  constexpr std::int64_t kTotal = std::int64_t{1} << 60;
  EXPECT_EQ(flat_begin(1 << 20, 1 << 21, kTotal), kTotal / 2);
  EXPECT_EQ(flat_begin(1 << 21, 1 << 21, kTotal), kTotal);
}

TEST(SplitSchedule, LocatesEverySegment) {
  const std::vector<std::int64_t> lengths{0, 1, 256, -7, 257, 0, 0, 1000, 0};
  const std::vector<std::int64_t> prefix = prefix_of(lengths);
  const auto num_requests = static_cast<std::int64_t>(lengths.size());
  std::int64_t flat = 0;
  for (std::int64_t request = 0; request < num_requests; ++request) {
    const std::int64_t segments = num_segments(lengths[static_cast<std::size_t>(request)]);
    for (std::int64_t segment = 0; segment < segments; ++segment, ++flat) {
      const SegmentPosition found = locate_segment(prefix.data(), num_requests, flat);
      EXPECT_EQ(found.request, request);
      EXPECT_EQ(found.segment, segment);
    }
  }
  const SegmentPosition end = locate_segment(prefix.data(), num_requests, flat);
  EXPECT_EQ(end.request, num_requests);
  EXPECT_EQ(end.segment, 0);
}

using test::strided_view;
using test::view;

std::vector<std::int32_t> metadata(const TensorView& context_lens, std::int64_t num_sms) {
  std::vector<std::int32_t> out(static_cast<std::size_t>(2 * (num_sms + 1)), -99);
  PagedMqaLogitsMetadataParams params;
  params.context_lens = context_lens;
  params.block_kv = 64;
  params.num_sms = num_sms;
  params.out = view(out, {num_sms + 1, 2});
  EXPECT_TRUE(cpu::paged_mqa_logits_metadata(params).ok());
  return out;
}

TEST(PagedMqaLogitsMetadata, SpreadsSegmentsEvenly) {
  std::vector<std::int32_t> lens{300, 0, 1024, 1};  // 2 + 0 + 4 + 1 segments
  const std::vector<std::int32_t> expected{0, 0, 0, 1, 2, 1, 2, 3, 4, 0};
  EXPECT_EQ(metadata(view(lens, {4}), 4), expected);
}

TEST(PagedMqaLogitsMetadata, ARequestIsAsLongAsItsLongestRow) {
  // [2, 2]: rows {10, 600} and {-5, -1}, the columns far apart.
  std::vector<std::int32_t> lens{10, -5, 0, 0, 0, 0, 600, -1};
  const std::vector<std::int32_t> expected{0, 0, 0, 1, 0, 2, 2, 0};
  EXPECT_EQ(metadata(strided_view(lens.data(), {2, 2}, {1, 6}), 3), expected);
}

TEST(PagedMqaLogitsMetadata, NothingToDoIsTheEnd) {
  std::vector<std::int32_t> lens{0, -3, std::numeric_limits<std::int32_t>::min()};
  const std::vector<std::int32_t> expected{3, 0, 3, 0, 3, 0};
  EXPECT_EQ(metadata(view(lens, {3}), 2), expected);
  std::vector<std::int32_t> none;
  EXPECT_EQ(metadata(view(none, {0}), 2), (std::vector<std::int32_t>{0, 0, 0, 0, 0, 0}));
}

TEST(PagedMqaLogitsMetadata, HugeLengths) {
  std::vector<std::int32_t> lens(3, std::numeric_limits<std::int32_t>::max());
  const std::vector<std::int32_t> expected{0, 0, 1, 1 << 22, 3, 0};
  EXPECT_EQ(metadata(view(lens, {3}), 2), expected);
}

}  // namespace
}  // namespace dsa
