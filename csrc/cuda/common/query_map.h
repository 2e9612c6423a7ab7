// SPDX-License-Identifier: Apache-2.0
// Queries of attention for the copy engine: 64 dims, 128 bytes, of a tile's heads at a time.
#pragma once

#include <cstdint>

#include "cuda/common/tensor_map.h"
#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa::cuda {

// Of q [.., heads, dim] bytes from one to the next along `dim`, of a dimension of one element any.
inline std::int64_t query_stride(const TensorView& q, int dim) {
  constexpr std::int64_t kBytes = 2;
  return kBytes * (q.size(dim) > 1 ? q.stride(dim) : q.size(-1));
}

inline bool query_map_takes(const TensorView& q) {
  for (int dim = 0; dim + 1 < q.ndim; ++dim) {
    if (!tensor_map_takes(q.data, query_stride(q, dim))) return false;
  }
  return true;
}

// Coordinates: byte of a head, head, token of the request (one of q [tokens, heads, dim]), request.
inline Status make_query_map(const TensorView& q, int heads_of_tile, CUtensorMap& map) {
  const bool has_requests = q.ndim == 4;
  const std::int64_t token_stride = query_stride(q, has_requests ? 1 : 0);
  return make_tensor_map({q.data,
                          4,
                          {2 * q.size(-1), q.size(-2), has_requests ? q.size(1) : 1, q.size(0)},
                          {query_stride(q, q.ndim - 2), token_stride, query_stride(q, 0)},
                          {128, heads_of_tile, 1, 1}},
                         map);
}

}  // namespace dsa::cuda
