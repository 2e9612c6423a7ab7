// SPDX-License-Identifier: Apache-2.0
// Indexer scores straight to the k best keys, flat and paged, through the tile engine of
// mqa_tile.h.
//
// A work item is a block of query rows by a range of keys. Its rows keep at most k candidates each;
// a chunk of new scores is appended and select_topk cuts the row back to k. Candidates stand in
// ascending key order, so that ties go to the lower key, and the k best of (k best so far + chunk)
// are the k best of all: the result is exact whatever the cuts. Few rows with many keys are cut
// into several ranges, whose candidates a second pass merges the same way.
// Memory: a worker's block of queries, one tile of keys and its candidates, within
// kWorkspaceBudget; the ranges' candidates, within kRangeCandidateBytes.
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/cpu_kernels.h"
#include "cpu/mqa_tile.h"
#include "cpu/topk_row.h"

namespace dsa::cpu {

namespace {

constexpr std::int64_t kChunkKeys = 32 * kTileKeys;
constexpr std::int64_t kMinRangeKeys = 8 * kTileKeys;
constexpr std::int64_t kRangeCandidateBytes = std::int64_t{16} << 20;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// The k best keys of one row so far, ascending, and room for a chunk of new scores behind them.
class RowCandidates {
 public:
  RowCandidates(std::int64_t k, std::int64_t chunk)
      : k_(k),
        scores_(static_cast<std::size_t>(k + chunk)),
        keys_(static_cast<std::size_t>(k + chunk)),
        columns_(static_cast<std::size_t>(k)) {}
  static std::int64_t bytes(std::int64_t k, std::int64_t chunk) { return 8 * (k + chunk) + 4 * k; }

  void reset() { kept_ = filled_ = 0; }

  // Keys must come in ascending order.
  void append(const float* scores, const std::int32_t* keys, std::int64_t n) {
    if (filled_ + n > static_cast<std::int64_t>(scores_.size())) cut();
    std::copy_n(scores, n, scores_.data() + filled_);
    std::copy_n(keys, n, keys_.data() + filled_);
    filled_ += n;
  }
  void append(const float* scores, std::int64_t first_key, std::int64_t n) {
    if (filled_ + n > static_cast<std::int64_t>(scores_.size())) cut();
    std::copy_n(scores, n, scores_.data() + filled_);
    std::iota(keys_.data() + filled_, keys_.data() + filled_ + n,
              static_cast<std::int32_t>(first_key));
    filled_ += n;
  }

  // Leaves the k best; size() of them, in ascending key order.
  void cut() {
    if (filled_ > k_) {
      select_topk(scores_.data(), filled_, k_, columns_.data());
      // In place: the columns ascend, columns_[i] >= i.
      for (std::int64_t i = 0; i < k_; ++i) {
        scores_[i] = scores_[columns_[i]];
        keys_[i] = keys_[columns_[i]];
      }
      filled_ = k_;
    }
    kept_ = filled_;
  }

  std::int64_t size() const { return kept_; }
  const float* scores() const { return scores_.data(); }
  const std::int32_t* keys() const { return keys_.data(); }

 private:
  std::int64_t k_;
  std::int64_t kept_ = 0;
  std::int64_t filled_ = 0;
  std::vector<float> scores_;
  std::vector<std::int32_t> keys_;
  std::vector<std::int32_t> columns_;
};

// Writes a row of the output: keys, or their slots, then padding.
struct TopkWriter {
  const TensorView& indices;
  const TensorView& scores;      // may be undefined
  const PagedProblem* to_slots;  // nullptr: keys as they are

  std::int64_t topk() const { return indices.size(1); }

  void write(std::int64_t row, const RowCandidates& best) const {
    write_keys(row, best.size(), [&](std::int64_t i) { return best.keys()[i]; });
    if (!scores.defined()) return;
    float* dst = scores.ptr<float>() + row * scores.stride(0);
    std::copy_n(best.scores(), best.size(), dst);
    std::fill(dst + best.size(), dst + topk(), kMinusInf);
  }

  template <typename KeyAt>
  void write_keys(std::int64_t row, std::int64_t n, KeyAt key_at) const {
    std::int32_t* dst = indices.ptr<std::int32_t>() + row * indices.stride(0);
    const PageTableRow pages = to_slots != nullptr ? to_slots->pages(row) : PageTableRow{};
    for (std::int64_t i = 0; i < n; ++i) {
      dst[i] = narrow_or_invalid(to_slots != nullptr ? pages.slot(key_at(i)) : key_at(i));
    }
    std::fill(dst + n, dst + topk(), static_cast<std::int32_t>(kInvalidSlot));
  }
};

// What the ranges of a row leave for the merge: [rows, ranges, k].
class RangeCandidates {
 public:
  RangeCandidates(std::int64_t rows, std::int64_t ranges, std::int64_t k)
      : ranges_(ranges),
        k_(k),
        sizes_(static_cast<std::size_t>(rows * ranges)),
        scores_(static_cast<std::size_t>(rows * ranges * k)),
        keys_(static_cast<std::size_t>(rows * ranges * k)) {}

  void put(std::int64_t row, std::int64_t range, const RowCandidates& best) {
    const std::int64_t at = row * ranges_ + range;
    sizes_[at] = best.size();
    std::copy_n(best.scores(), best.size(), scores_.data() + at * k_);
    std::copy_n(best.keys(), best.size(), keys_.data() + at * k_);
  }

  void merge(std::int64_t row, RowCandidates& into) const {
    into.reset();
    for (std::int64_t at = row * ranges_; at < (row + 1) * ranges_; ++at) {
      into.append(scores_.data() + at * k_, keys_.data() + at * k_, sizes_[at]);
    }
    into.cut();
  }

 private:
  std::int64_t ranges_, k_;
  std::vector<std::int64_t> sizes_;
  std::vector<float> scores_;
  std::vector<std::int32_t> keys_;
};

struct Workspace {
  MqaTile tile;
  std::vector<RowCandidates> rows;
};

class FusedTopk {
 public:
  FusedTopk(const MqaProblem& problem, const TopkWriter& out)
      : problem_(problem),
        out_(out),
        keep_(std::min(out.topk(), problem.num_keys)),
        // A cut costs a pass over keep_ + chunk: a long keep_ wants a long chunk.
        chunk_(std::min(std::max(keep_, kChunkKeys), problem.num_keys + kTileKeys)),
        grid_{problem, choose_block_rows(problem, RowCandidates::bytes(keep_, chunk_))},
        ranges_(count_ranges()),
        range_keys_((problem.num_keys + ranges_ - 1) / ranges_) {}

  void run() {
    const std::int64_t rows = problem_.num_groups * problem_.rows_per_group;
    const double flops = score_flops(problem_, problem_.num_keys) * static_cast<double>(rows);
    RangeCandidates candidates(ranges_ > 1 ? rows : 0, ranges_, keep_);
    for_each_item(
        {grid_.num_blocks() * ranges_, flops, workspace_bytes()}, [&] { return workspace(); },
        [&](Workspace& w, std::int64_t item) {
          select_range(w, grid_.block(item / ranges_), item % ranges_, candidates);
        });
    if (ranges_ == 1) return;
    for_each_item(
        {rows, flops / 64, RowCandidates::bytes(keep_, keep_)},
        [&] { return RowCandidates(keep_, keep_); },
        [&](RowCandidates& best, std::int64_t row) {
          candidates.merge(row, best);
          out_.write(row, best);
        });
  }

 private:
  std::int64_t count_ranges() const {
    const std::int64_t rows = problem_.num_groups * problem_.rows_per_group;
    const std::int64_t blocks = std::max<std::int64_t>(grid_.num_blocks(), 1);
    const std::int64_t wanted = 4 * hardware_threads() / blocks;
    const std::int64_t affordable =
        kRangeCandidateBytes / (8 * std::max<std::int64_t>(rows * keep_, 1));
    // A range should be long against what it hands on.
    const std::int64_t worthwhile = problem_.num_keys / std::max(kMinRangeKeys, 2 * keep_);
    return std::max<std::int64_t>(1, std::min({wanted, affordable, worthwhile}));
  }

  std::int64_t workspace_bytes() const {
    return MqaTile::bytes(problem_, grid_.rows) + grid_.rows * RowCandidates::bytes(keep_, chunk_);
  }

  Workspace workspace() const {
    return {MqaTile(problem_, grid_.rows),
            std::vector<RowCandidates>(static_cast<std::size_t>(grid_.rows),
                                       RowCandidates(keep_, chunk_))};
  }

  // A window that fits whole is the answer, without a score unless those are asked for.
  bool needs_scores(const QueryBlock& block) const {
    if (out_.scores.defined() || ranges_ > 1) return true;
    return std::any_of(block.windows, block.windows + block.rows,
                       [&](Window w) { return w.size() > out_.topk(); });
  }

  void select_range(Workspace& w, const QueryBlock& block, std::int64_t range,
                    RangeCandidates& candidates) const {
    if (!needs_scores(block)) {
      for (int r = 0; r < block.rows; ++r) {
        const Window seen = block.windows[r];
        out_.write_keys(block.first_row + r, seen.size(),
                        [&](std::int64_t i) { return static_cast<std::int32_t>(seen.begin + i); });
      }
      return;
    }
    for (int r = 0; r < block.rows; ++r) w.rows[r].reset();
    const Window keys = {range * range_keys_, (range + 1) * range_keys_};
    if (intersect(keys, block.all).size() > 0) {
      w.tile.load_queries(block);
      score_keys(block, keys, w.tile, [&](int r, std::int64_t key, int n, const float* scores) {
        w.rows[r].append(scores, key, n);
      });
    }
    for (int r = 0; r < block.rows; ++r) {
      w.rows[r].cut();
      if (ranges_ == 1) {
        out_.write(block.first_row + r, w.rows[r]);
      } else {
        candidates.put(block.first_row + r, range, w.rows[r]);
      }
    }
  }

  const MqaProblem& problem_;
  const TopkWriter& out_;
  std::int64_t keep_;   // candidates a row
  std::int64_t chunk_;  // scores appended between two cuts
  BlockGrid grid_;
  std::int64_t ranges_;  // pieces that the keys are cut into
  std::int64_t range_keys_;
};

}  // namespace

Status mqa_topk(const MqaTopkParams& params) {
  const FlatProblem problem(params, params.k.size(0));
  const TopkWriter out{params.indices, params.scores, nullptr};
  FusedTopk(problem, out).run();
  return {};
}

Status paged_mqa_topk(const PagedMqaTopkParams& params) {
  const PagedProblem problem(params);
  const TopkWriter out{params.indices, params.scores, params.return_slots ? &problem : nullptr};
  FusedTopk(problem, out).run();
  return {};
}

}  // namespace dsa::cpu
