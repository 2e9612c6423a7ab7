// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/float_order.h"
#include "cpu/cpu_kernels.h"
#include "cpu/tensor_rows.h"
#include "dsa/parallel.h"

namespace dsa::cpu {
namespace {

struct Candidate {
  std::uint32_t key;  // ordered score
  std::int32_t index;
  std::int32_t position;
};

bool earlier(const Candidate& a, const Candidate& b) {
  return a.index != b.index ? a.index < b.index : a.position < b.position;
}
bool better(const Candidate& a, const Candidate& b) {
  return a.key != b.key ? a.key > b.key : earlier(a, b);
}

// How many candidates are held before the best k are kept: the more, the rarer that is.
std::int64_t candidate_capacity(const MergeTopkParams& params) {
  constexpr std::int64_t kMinCapacity = 4096;
  return std::min(std::max(2 * params.topk, kMinCapacity), params.scores.size(1));
}

class RowMerger {
 public:
  explicit RowMerger(const MergeTopkParams& params)
      : params_(params), capacity_(static_cast<std::size_t>(candidate_capacity(params))) {
    candidates_.reserve(capacity_);
  }

  void run(std::int64_t row) {
    candidates_.clear();
    for (std::int64_t position = 0; position < params_.scores.size(1); ++position) {
      const std::int32_t index = index_at(row, position);
      if (index < 0) continue;
      if (candidates_.size() == capacity_) keep_best();
      candidates_.push_back(
          {ordered_key(score_at(row, position)), index, static_cast<std::int32_t>(position)});
    }
    keep_best();
    std::sort(candidates_.begin(), candidates_.end(), earlier);
    write(row);
  }

 private:
  std::int32_t index_at(std::int64_t row, std::int64_t position) const {
    const TensorView& indices = params_.indices;
    return indices
        .ptr<const std::int32_t>()[row * indices.stride(0) + position * indices.stride(1)];
  }

  float score_at(std::int64_t row, std::int64_t position) const {
    const TensorView& scores = params_.scores;
    const std::int64_t offset = row * scores.stride(0) + position * scores.stride(1);
    float score;
    load_as_float(element(scores.data, scores.dtype, offset), scores.dtype, 1, 1, &score);
    return score;
  }

  void keep_best() {
    const auto k = static_cast<std::size_t>(params_.topk);
    if (candidates_.size() <= k) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + params_.topk, candidates_.end(),
                     better);
    candidates_.resize(k);
  }

  void write(std::int64_t row) const {
    const auto count = static_cast<std::int64_t>(candidates_.size());
    std::int32_t* out =
        params_.out_indices.ptr<std::int32_t>() + row * params_.out_indices.stride(0);
    for (std::int64_t i = 0; i < count; ++i)
      out[i] = candidates_[static_cast<std::size_t>(i)].index;
    std::fill(out + count, out + params_.topk, -1);
    if (!params_.out_scores.defined()) return;

    float* out_scores = params_.out_scores.ptr<float>() + row * params_.out_scores.stride(0);
    for (std::int64_t i = 0; i < count; ++i) {
      out_scores[i] = score_at(row, candidates_[static_cast<std::size_t>(i)].position);
    }
    std::fill(out_scores + count, out_scores + params_.topk,
              -std::numeric_limits<float>::infinity());
  }

  const MergeTopkParams& params_;
  const std::size_t capacity_;
  std::vector<Candidate> candidates_;
};

// Rows a range takes at least, so that the candidates of all ranges at work stay within 64 MiB.
std::int64_t memory_grain(const MergeTopkParams& params) {
  constexpr std::int64_t kMaxBytes = std::int64_t{64} << 20;
  const std::int64_t row_bytes =
      candidate_capacity(params) * static_cast<std::int64_t>(sizeof(Candidate));
  const std::int64_t max_ranges =
      std::max<std::int64_t>(kMaxBytes / std::max<std::int64_t>(row_bytes, 1), 1);
  return (params.scores.size(0) + max_ranges - 1) / max_ranges;
}

}  // namespace

Status merge_topk(const MergeTopkParams& params) {
  const std::int64_t grain = std::max(row_grain(params.scores.size(1)), memory_grain(params));
  parallel_for(0, params.scores.size(0), grain, [&](std::int64_t begin, std::int64_t end) {
    RowMerger merger(params);
    for (std::int64_t row = begin; row < end; ++row) merger.run(row);
  });
  return {};
}

}  // namespace dsa::cpu
