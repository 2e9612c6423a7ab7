// SPDX-License-Identifier: Apache-2.0
// Pages of a cache of 16-bit latents for the copy engine: 64 dims, 128 bytes, of a block of tokens.
#pragma once

#include <cstdint>

#include "cuda/common/tensor_map.h"
#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa::cuda {

inline std::int64_t page_token_stride(const TensorView& cache) { return 2 * cache.stride(1); }
// Of one page any.
inline std::int64_t page_stride(const TensorView& cache) {
  return 2 * (cache.size(0) > 1 ? cache.stride(0) : cache.size(3));
}

// Whether pages are whole blocks, as the copy engine takes them.
inline bool page_map_takes(const TensorView& cache, int tokens_of_block) {
  return cache.size(0) > 0 && cache.size(1) % tokens_of_block == 0 &&
         tensor_map_takes(cache.data, page_token_stride(cache)) &&
         tensor_map_takes(cache.data, page_stride(cache));
}

// Coordinates: byte of a token, token of the page, page.
inline Status make_page_map(const TensorView& cache, int tokens_of_block, CUtensorMap& map) {
  return make_tensor_map({cache.data,
                          3,
                          {2 * cache.size(3), cache.size(1), cache.size(0)},
                          {page_token_stride(cache), page_stride(cache)},
                          {128, tokens_of_block, 1}},
                         map);
}

}  // namespace dsa::cuda
