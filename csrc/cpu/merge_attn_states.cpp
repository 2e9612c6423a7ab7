// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/cpu_kernels.h"
#include "cpu/tensor_rows.h"
#include "dsa/parallel.h"

namespace dsa::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The state of one (row, head) in every split. An empty split's output is not read: it may be
// anything.
class HeadMerger {
 public:
  explicit HeadMerger(const MergeAttnStatesParams& params)
      : params_(params),
        merged_(static_cast<std::size_t>(params.outs.size(3))),
        part_(static_cast<std::size_t>(params.outs.size(3))) {}

  void run(std::int64_t row, std::int64_t head) {
    float max = -kInf;
    for (std::int64_t split = 0; split < num_splits(); ++split) {
      if (!empty(lse(split, row, head))) max = std::max(max, lse(split, row, head));
    }
    float sum = 0.0f;
    for (std::int64_t split = 0; split < num_splits(); ++split) {
      sum += weight(lse(split, row, head), max);
    }
    std::fill(merged_.begin(), merged_.end(), 0.0f);
    for (std::int64_t split = 0; split < num_splits(); ++split) {
      const float split_lse = lse(split, row, head);
      if (!empty(split_lse)) accumulate(split, row, head, weight(split_lse, max) / sum);
    }
    store(row, head, sum == 0.0f ? kInf : max + std::log(sum));
  }

 private:
  std::int64_t num_splits() const { return params_.outs.size(0); }
  static bool empty(float lse) { return std::isinf(lse); }
  static float weight(float lse, float max) { return empty(lse) ? 0.0f : std::exp(lse - max); }

  float lse(std::int64_t split, std::int64_t row, std::int64_t head) const {
    const TensorView& lses = params_.lses;
    return lses
        .ptr<const float>()[split * lses.stride(0) + row * lses.stride(1) + head * lses.stride(2)];
  }

  void accumulate(std::int64_t split, std::int64_t row, std::int64_t head, float weight) {
    const TensorView& outs = params_.outs;
    const std::int64_t offset =
        split * outs.stride(0) + row * outs.stride(1) + head * outs.stride(2);
    load_as_float(element(outs.data, outs.dtype, offset), outs.dtype, 1, outs.size(3),
                  part_.data());
    for (std::size_t i = 0; i < merged_.size(); ++i) merged_[i] += weight * part_[i];
  }

  void store(std::int64_t row, std::int64_t head, float lse) const {
    const TensorView& out = params_.out;
    store_from_float(merged_.data(), out.size(2), out.dtype,
                     element(out.data, out.dtype, row * out.stride(0) + head * out.stride(1)));
    params_.lse.ptr<float>()[row * params_.lse.stride(0) + head * params_.lse.stride(1)] = lse;
  }

  const MergeAttnStatesParams& params_;
  std::vector<float> merged_;
  std::vector<float> part_;
};

}  // namespace

Status merge_attn_states(const MergeAttnStatesParams& params) {
  const std::int64_t num_heads = params.out.size(1);
  const std::int64_t elements_per_head = params.outs.size(0) * params.outs.size(3);
  parallel_for(0, params.out.size(0) * num_heads, row_grain(elements_per_head),
               [&](std::int64_t begin, std::int64_t end) {
                 HeadMerger merger(params);
                 for (std::int64_t i = begin; i < end; ++i) {
                   merger.run(i / num_heads, i % num_heads);
                 }
               });
  return {};
}

}  // namespace dsa::cpu
