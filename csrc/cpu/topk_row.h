// SPDX-License-Identifier: Apache-2.0
// Exact top-k of one row of scores, by radix selection.
#pragma once

#include <cstdint>

#include "dsa/params.h"

namespace dsa::cpu {

// One row of scores, of any stride. Read in chunks, so that no row is ever copied whole.
struct ScoreRow {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;  // f32 | bf16 | f16
  std::int64_t stride = 1;        // elements

  // The scores of columns [begin, begin + count) as fp32: in place where they stand so, else in
  // `buffer`.
  const float* read(std::int64_t begin, std::int64_t count, float* buffer) const;
  float at(std::int64_t column) const;
  ScoreRow from(std::int64_t column) const;
};

// Writes the ascending columns of the k largest of n scores and returns how many: min(k, n), or 0
// where n is <= 0. Order: NaN below -inf, -0.0 = +0.0, ties to the lower column. n <= 2^31;
// columns has room for min(k, n) entries. Needs no heap.
std::int64_t select_topk(const ScoreRow& scores, std::int64_t n, std::int64_t k,
                         std::int32_t* columns);

inline std::int64_t select_topk(const float* scores, std::int64_t n, std::int64_t k,
                                std::int32_t* columns) {
  return select_topk(ScoreRow{scores, DType::kFloat32, 1}, n, k, columns);
}

}  // namespace dsa::cpu
