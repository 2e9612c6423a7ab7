// SPDX-License-Identifier: Apache-2.0
// Loops that must unroll: what indexes registers by the index is known to the compiler.
#pragma once

#include <type_traits>
#include <utility>

namespace dsa::cuda {

// visit(integral_constant i) for i in [0, kCount), in order.
template <int kCount, typename Visit>
__device__ __forceinline__ void unrolled(Visit&& visit) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    (visit(std::integral_constant<int, kIndices>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace dsa::cuda
