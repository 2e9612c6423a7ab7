// SPDX-License-Identifier: Apache-2.0
// Two ways to the same answer, both exact and both one digit of the ordered key at a time:
//   direct    - histogram the row until the k-th largest key is known, then emit what reaches it;
//   streaming - keep a buffer of candidates and the k-th largest key of them; read the row once,
//               append what beats that key, and cut the buffer back to k when it fills. Where k is
//               small against n, vector comparisons dismiss most blocks of scores.
#include "cpu/topk_row.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/float_order.h"
#include "cpu/convert.h"

namespace dsa::cpu {
namespace {

constexpr std::int64_t kChunk = 2048;     // scores converted at a time
constexpr std::int64_t kBlock = 16;       // scores dismissed at a time
constexpr std::int64_t kCapacity = 8192;  // candidates of the streaming way
constexpr int kKeyBits = 32;
constexpr int kMaxDigitBits = 11;

// The selected keys: all above `key`, and the first `num_ties` (in column order) equal to it.
struct Threshold {
  std::uint32_t key;
  std::int64_t num_ties;

  // The least selected key.
  std::uint32_t lowest() const { return key + (num_ties == 0 ? 1u : 0u); }
};

template <typename Body>
void for_each_chunk(const ScoreRow& row, std::int64_t n, Body&& body) {
  float buffer[kChunk];
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t count = std::min(kChunk, n - begin);
    if (!body(row.read(begin, count, buffer), begin, count)) return;
  }
}

// Dismisses blocks of scores that are all below a key. Orders the bits as signed integers, which
// takes half the instructions of ordered_key but is blind to what NaN and -0.0 mean: no score that
// reaches the key is dismissed, and what passes is to be tested again. Written with vectors since
// compilers tend to unroll the loop over a block before they see that it vectorises.
class BlockFilter {
 public:
  explicit BlockFilter(std::uint32_t lowest) {
    const std::uint32_t zero = ordered_key(0.0f);
    const std::uint32_t with_minus_zero = lowest == zero ? zero - 1u : lowest;
    lowest_ += static_cast<std::int32_t>(with_minus_zero ^ kF32SignBit);
  }

  bool passes(const float* scores) const {
    Lanes reached{};
    for (std::int64_t i = 0; i < kBlock; i += kLanes) {
      Lanes bits;
      std::memcpy(&bits, scores + i, sizeof(bits));
      reached |= (bits ^ (bits >> 31 & 0x7FFF'FFFF)) >= lowest_;
    }
    std::uint64_t words[2];
    std::memcpy(words, &reached, sizeof(words));
    return (words[0] | words[1]) != 0;
  }

 private:
  static constexpr std::int64_t kLanes = 4;
  typedef std::int32_t Lanes __attribute__((vector_size(kLanes * sizeof(std::int32_t))));
  Lanes lowest_{};
};

// Counts of one digit over the keys that begin with a known prefix. Neighbouring scores are counted
// in different copies: equal scores would otherwise wait for each other's increment.
class DigitHistogram {
 public:
  void count(const ScoreRow& row, std::int64_t n, std::uint32_t prefix, int prefix_bits, int bits) {
    std::fill_n(&counts_[0][0], kCopies << kMaxDigitBits, 0u);
    const int shift = kKeyBits - prefix_bits - bits;
    const std::uint32_t mask = (1u << bits) - 1u;
    for_each_chunk(row, n, [&](const float* scores, std::int64_t, std::int64_t size) {
      for (std::int64_t i = 0; i < size; ++i) {
        const std::uint32_t key = ordered_key(scores[i]);
        const bool counted = prefix_bits == 0 || key >> (kKeyBits - prefix_bits) == prefix;
        if (counted) ++counts_[i % kCopies][key >> shift & mask];
      }
      return true;
    });
  }

  std::int64_t operator[](std::uint32_t digit) const {
    std::int64_t sum = 0;
    for (const auto& copy : counts_) sum += copy[digit];
    return sum;
  }

 private:
  static constexpr int kCopies = 2;
  std::uint32_t counts_[kCopies][1 << kMaxDigitBits];
};

// 0 < k < n.
Threshold find_threshold(const ScoreRow& row, std::int64_t n, std::int64_t k) {
  DigitHistogram histogram;
  std::uint32_t prefix = 0;
  int prefix_bits = 0;
  std::int64_t wanted = k;  // of the keys that begin with prefix
  for (const int bits : {11, 11, 10}) {
    histogram.count(row, n, prefix, prefix_bits, bits);
    std::uint32_t digit = (1u << bits) - 1u;
    for (; histogram[digit] < wanted; --digit) wanted -= histogram[digit];
    prefix = prefix << bits | digit;
    prefix_bits += bits;
    // All of this prefix are wanted: no need to tell them apart. (prefix > 0, since k < n.)
    if (histogram[digit] == wanted) return {(prefix << (kKeyBits - prefix_bits)) - 1u, 0};
  }
  return {prefix, wanted};
}

// Writes the ascending columns of the k scores that the threshold selects.
void emit_selected(const ScoreRow& row, std::int64_t n, std::int64_t k, Threshold threshold,
                   std::int32_t* columns) {
  std::int64_t emitted = 0;
  std::uint32_t lowest = threshold.lowest();
  const auto emit = [&](float score, std::int64_t column) {
    const std::uint32_t key = ordered_key(score);
    if (key < lowest) return;
    if (key == threshold.key && --threshold.num_ties == 0) ++lowest;
    columns[emitted++] = static_cast<std::int32_t>(column);
  };
  for_each_chunk(row, n, [&](const float* scores, std::int64_t begin, std::int64_t size) {
    std::int64_t i = 0;
    for (; i + kBlock <= size; i += kBlock) {
      if (!BlockFilter(lowest).passes(scores + i)) continue;
      for (std::int64_t j = i; j < i + kBlock; ++j) emit(scores[j], begin + j);
    }
    for (; i < size; ++i) emit(scores[i], begin + i);
    return emitted < k;
  });
}

void select_direct(const ScoreRow& row, std::int64_t n, std::int64_t k, std::int32_t* columns) {
  emit_selected(row, n, k, find_threshold(row, n, k), columns);
}

// The candidates of the streaming way, in column order.
struct CandidateBuffer {
  std::int64_t size = 0;
  float scores[kCapacity];
  std::int32_t columns[kCapacity];

  // Keeps the k best; returns the least key that a later column must have to join them (or one
  // below it, which costs a candidate but no correctness). Uses k entries of `positions`.
  std::uint32_t keep_best(std::int64_t k, std::int32_t* positions) {
    const ScoreRow row{scores, DType::kFloat32, 1};
    const Threshold threshold = find_threshold(row, size, k);
    emit_selected(row, size, k, threshold, positions);
    for (std::int64_t i = 0; i < k; ++i) {
      scores[i] = scores[positions[i]];
      columns[i] = columns[positions[i]];
    }
    size = k;
    return threshold.key + 1u;
  }

  void append(const float* new_scores, std::int64_t begin, std::int64_t count,
              std::uint32_t lowest) {
    for (std::int64_t i = 0; i < count; ++i) {
      scores[size] = new_scores[i];
      columns[size] = static_cast<std::int32_t>(begin + i);
      size += ordered_key(new_scores[i]) >= lowest ? 1 : 0;
    }
  }
};

// A key that about 2k of the n scores reach, judged by an even sample; 0, which all reach, where k
// is too near n. An estimate: it decides how long a selection takes, never what it selects.
std::uint32_t estimate_lowest(const ScoreRow& row, std::int64_t n, std::int64_t k) {
  constexpr std::int64_t kSamples = 2048;
  constexpr std::int64_t kSlack = 16;  // keeps the estimate low enough where few samples decide it
  static_assert(kSamples <= kCapacity);  // < n, so that step >= 1
  const std::int64_t rank = 2 * k * kSamples / n + kSlack;
  if (rank >= kSamples) return 0;
  float samples[kSamples];
  const std::int64_t step = n / kSamples;
  for (std::int64_t i = 0; i < kSamples; ++i) samples[i] = row.at(i * step);
  return find_threshold({samples, DType::kFloat32, 1}, kSamples, rank).lowest();
}

// Collects the k best of the scores that reach `lowest`; false where fewer than k do.
bool stream(const ScoreRow& row, std::int64_t n, std::int64_t k, std::uint32_t lowest,
            std::int32_t* columns) {
  CandidateBuffer candidates;
  for_each_chunk(row, n, [&](const float* scores, std::int64_t begin, std::int64_t size) {
    for (std::int64_t i = 0; i < size; i += kBlock) {
      const std::int64_t count = std::min(kBlock, size - i);
      if (count == kBlock && !BlockFilter(lowest).passes(scores + i)) continue;
      // append writes the whole block before it keeps what reaches.
      if (candidates.size + kBlock > kCapacity) lowest = candidates.keep_best(k, columns);
      candidates.append(scores + i, begin + i, count, lowest);
    }
    return true;
  });
  if (candidates.size < k) return false;
  if (candidates.size > k) candidates.keep_best(k, columns);
  std::copy_n(candidates.columns, k, columns);
  return true;
}

void select_streaming(const ScoreRow& row, std::int64_t n, std::int64_t k, std::int32_t* columns) {
  if (!stream(row, n, k, estimate_lowest(row, n, k), columns)) stream(row, n, k, 0, columns);
}

}  // namespace

const float* ScoreRow::read(std::int64_t begin, std::int64_t count, float* buffer) const {
  if (dtype == DType::kFloat32 && stride == 1) return static_cast<const float*>(data) + begin;
  load_as_float(from(begin).data, dtype, stride, count, buffer);
  return buffer;
}

float ScoreRow::at(std::int64_t column) const {
  float score;
  load_as_float(from(column).data, dtype, 1, 1, &score);
  return score;
}

ScoreRow ScoreRow::from(std::int64_t column) const {
  return {element(data, dtype, column * stride), dtype, stride};
}

std::int64_t select_topk(const ScoreRow& scores, std::int64_t n, std::int64_t k,
                         std::int32_t* columns) {
  if (n <= 0 || k <= 0) return 0;
  if (k >= n) {
    std::iota(columns, columns + n, 0);
    return n;
  }
  // The streaming way needs room to collect at least as many candidates as it keeps.
  const bool streaming = n > kCapacity && k <= kCapacity / 2;
  (streaming ? select_streaming : select_direct)(scores, n, k, columns);
  return k;
}

}  // namespace dsa::cpu
