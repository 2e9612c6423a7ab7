// SPDX-License-Identifier: Apache-2.0
// Unions of the rows that neighbouring query tokens have selected, so that a row is copied once for
// a group of them.
#pragma once

#include <cstdint>

#include "cuda/common/attention_keys.cuh"

namespace dsa::cuda::sm90a {

// Of a launch's groups of query tokens, one after another.
struct RowUnions {
  static constexpr int kSlotBits = 28;  // of a row; above, a bit for each token that has it
  static constexpr std::int64_t kMostSlots = std::int64_t{1} << kSlotBits;
  static constexpr std::uint32_t kSlots = kMostSlots - 1;

  std::uint32_t* rows = nullptr;  // [groups, capacity]
  std::int32_t* sizes = nullptr;  // [groups]
  // Groups that have a union, and tokens of those that have none, as the launch counts them, in any
  // order; and how many of either.
  unsigned* groups = nullptr;
  unsigned* tokens = nullptr;
  unsigned* counts = nullptr;
  int capacity = 0;

  // Tokens that are to be attended to by themselves. By one thread.
  __device__ void add_tokens(int first, int count) const {
    const unsigned at = atomicAdd(&counts[1], static_cast<unsigned>(count));
    for (int i = 0; i < count; ++i) tokens[at + i] = static_cast<unsigned>(first + i);
  }
};

// The keys of a group of query tokens, numbered 0 .. size. What is fetched of one also tells which
// of the tokens have it.
class UnionSequence {
 public:
  __device__ void init(const RowUnions& unions, unsigned group) {
    rows_ = unions.rows + std::int64_t{group} * unions.capacity;
    size_ = unions.sizes[group];
  }

  __device__ int size() const { return size_; }
  __device__ std::uint32_t fetch(const AttentionArgs&, int key) const {
    return key < size_ ? rows_[key] : 0;
  }
  __device__ static unsigned queries(std::uint32_t fetched) {
    return fetched >> RowUnions::kSlotBits;
  }
  __device__ KeyRow row(const AttentionArgs& args, int, std::uint32_t fetched) const {
    if (queries(fetched) == 0) return {};
    return row_of_slot(args.lists[0].rows, static_cast<std::int32_t>(fetched & RowUnions::kSlots));
  }

 private:
  const std::uint32_t* rows_;
  int size_;
};

}  // namespace dsa::cuda::sm90a
