// SPDX-License-Identifier: Apache-2.0
// Host tensors of random, hostile or packed contents.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <list>
#include <vector>

#include "compare.h"
#include "core/fp8.h"
#include "core/half.h"
#include "cpu_test_data.h"
#include "dsa/kv_layout.h"

namespace dsa::test {

inline constexpr std::uint8_t kUntouched = 0xFF;  // NaN in every float format, -1 in integers

using Sizes = std::initializer_list<std::int64_t>;

// Owns what its tensors point to.
class Arena {
 public:
  explicit Arena(std::uint32_t seed) : random(seed) {}

  // Uninitialised (0xFF) memory; the rows of the last dimension lie `pad` elements further apart.
  TensorView empty(DType dtype, Sizes sizes, std::int64_t pad = 0) {
    TensorView t;
    t.dtype = dtype;
    t.ndim = static_cast<std::int32_t>(sizes.size());
    int dim = 0;
    for (const std::int64_t size : sizes) t.sizes[dim++] = size;
    std::int64_t stride = 1;
    while (dim-- > 0) {
      t.strides[dim] = stride;
      stride *= t.sizes[dim];
      if (dim == t.ndim - 1) stride += pad;
    }
    return own(t);
  }
  // Pages of `page_size` rows, `pad` elements between a page and the next.
  TensorView empty_cache(DType dtype, std::int64_t pages, std::int64_t page_size,
                         std::int64_t width, std::int64_t pad) {
    TensorView t;
    t.dtype = dtype;
    t.ndim = 4;
    const std::int64_t sizes[] = {pages, page_size, 1, width};
    const std::int64_t strides[] = {page_size * width + pad, width, width, 1};
    std::copy(sizes, sizes + 4, t.sizes);
    std::copy(strides, strides + 4, t.strides);
    return own(t);
  }

  // float32, bfloat16 or float16 of [low, high).
  TensorView floats(DType dtype, Sizes sizes, float low, float high, std::int64_t pad = 0) {
    return filled(empty(dtype, sizes, pad),
                  [&](std::uint8_t* at) { put_float(at, dtype, random.uniform(low, high)); });
  }
  // float32 multiples of 1/4: sums of products with e4m3 integers are exact in any order.
  TensorView quarters(Sizes sizes, std::int64_t pad = 0) {
    return filled(empty(DType::kFloat32, sizes, pad), [&](std::uint8_t* at) {
      put(at, static_cast<float>(random.integer(-4, 4)) * 0.25f);
    });
  }
  TensorView e4m3(Sizes sizes, std::int64_t pad = 0) {
    return filled(empty(DType::kFloat8E4M3, sizes, pad),
                  [&](std::uint8_t* at) { *at = e4m3_encode(random.uniform(-4.0f, 4.0f)); });
  }
  TensorView e4m3_integers(Sizes sizes, std::int64_t pad = 0) {
    return filled(empty(DType::kFloat8E4M3, sizes, pad), [&](std::uint8_t* at) {
      *at = e4m3_encode(static_cast<float>(random.integer(-3, 3)));
    });
  }
  TensorView ints(Sizes sizes, std::int32_t low, std::int32_t high, std::int64_t pad = 0) {
    return filled(empty(DType::kInt32, sizes, pad),
                  [&](std::uint8_t* at) { put(at, random.integer(low, high)); });
  }
  // int32 around [0, bound]; `percent` of them far outside.
  TensorView hostile(Sizes sizes, std::int32_t bound, int percent = 20, std::int64_t pad = 0) {
    static constexpr std::int32_t kValues[] = {kIntMin, kIntMin + 1, -65536,  -2,          -1,
                                               0,       65536,       1 << 30, kIntMax - 1, kIntMax};
    return filled(empty(DType::kInt32, sizes, pad), [&](std::uint8_t* at) {
      const bool far = random.integer(0, 99) < percent;
      put(at, far ? kValues[random.integer(0, 9)] : random.integer(-1, bound));
    });
  }
  // int64 slots, each at most once, hostile ones among them.
  TensorView slots(std::int64_t tokens, std::int64_t count) {
    std::vector<std::int64_t> all(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) all[static_cast<std::size_t>(i)] = i;
    for (std::size_t i = all.size(); i > 1; --i) {
      const auto j = static_cast<std::size_t>(random.integer(0, static_cast<std::int32_t>(i) - 1));
      std::swap(all[i - 1], all[j]);
    }
    std::int64_t token = 0;
    return filled(empty(DType::kInt64, {tokens}), [&](std::uint8_t* at) {
      const std::int64_t i = token++;
      std::int64_t slot = i < count ? all[static_cast<std::size_t>(i)] : -1;
      if (i % 7 == 3) slot = count + i;
      if (i % 7 == 5) slot = std::int64_t{-1} << 62;
      put(at, slot);
    });
  }

  // Every token of an indexer cache: integers of e4m3, one scale for all or any.
  void fill_indexer_keys(const TensorView& cache, bool unit_scales) {
    const IndexerLayout layout{cache.size(3) - IndexerLayout::kScaleBytes, cache.size(1)};
    for_each_token(cache, [&](std::uint8_t* page, std::int64_t token) {
      for (std::int64_t i = 0; i < layout.head_dim; ++i) {
        const auto value = static_cast<float>(random.integer(-3, 3));
        page[layout.values(token) + i] = e4m3_encode(value);
      }
      put(page + layout.scale(token), unit_scales ? 1.0f : random.uniform(0.1f, 2.0f));
    });
  }
  // Every row of a latent cache: of 656 or 584 bytes, or 16-bit.
  void fill_latents(const TensorView& cache) {
    if (cache.dtype != DType::kUInt8) {
      filled(cache,
             [&](std::uint8_t* at) { put_float(at, cache.dtype, random.uniform(-1.0f, 1.0f)); });
    } else if (cache.size(3) == MlaV32Layout::kTokenBytes) {
      for_each_token(cache, [&](std::uint8_t* page, std::int64_t token) {
        fill_codes(page + MlaV32Layout::values(token), MlaV32Layout::kDimNope);
        for (std::int64_t i = 0; i < MlaV32Layout::kNumScales; ++i) {
          put(page + MlaV32Layout::scales(token) + 4 * i, random.uniform(0.1f, 0.5f));
        }
        fill_rope(page + MlaV32Layout::rope(token), MlaV32Layout::kDimRope);
      });
    } else {
      const MlaV4Layout layout{cache.size(1)};
      for_each_token(cache, [&](std::uint8_t* page, std::int64_t token) {
        fill_codes(page + MlaV4Layout::values(token), MlaV4Layout::kDimNope);
        fill_rope(page + MlaV4Layout::rope(token), MlaV4Layout::kDimRope);
        for (std::int64_t i = 0; i < MlaV4Layout::kNumScales; ++i) {
          page[layout.scales(token) + i] = static_cast<std::uint8_t>(random.integer(122, 126));
        }
      });
    }
  }

  Random random;

 private:
  TensorView own(TensorView t) {
    blocks_.emplace_back(extent_bytes(t), kUntouched);
    t.data = blocks_.back().data();
    return t;
  }
  template <typename Put>
  TensorView filled(TensorView t, Put&& put_element) {
    for_each_element(t,
                     [&](std::size_t at) { put_element(static_cast<std::uint8_t*>(t.data) + at); });
    return t;
  }
  template <typename T>
  static void put(std::uint8_t* at, T value) {
    std::memcpy(at, &value, sizeof(value));
  }
  static void put_float(std::uint8_t* at, DType dtype, float value) {
    if (dtype == DType::kFloat32) return put(at, value);
    put(at, dtype == DType::kFloat16 ? f16_from_float(value) : bf16_from_float(value));
  }
  void fill_codes(std::uint8_t* at, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) at[i] = e4m3_encode(random.uniform(-4.0f, 4.0f));
  }
  void fill_rope(std::uint8_t* at, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      put(at + 2 * i, bf16_from_float(random.uniform(-1.0f, 1.0f)));
    }
  }
  template <typename Visit>
  static void for_each_token(const TensorView& cache, Visit&& visit) {
    for (std::int64_t page = 0; page < cache.size(0); ++page) {
      for (std::int64_t token = 0; token < cache.size(1); ++token) {
        visit(cache.ptr<std::uint8_t>() + page * cache.stride(0), token);
      }
    }
  }

  std::list<std::vector<std::uint8_t>> blocks_;
};

}  // namespace dsa::test
