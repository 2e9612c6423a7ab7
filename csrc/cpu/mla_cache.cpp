// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/fp8.h"
#include "core/half.h"
#include "core/page_table.h"
#include "core/quant_group.h"
#include "cpu/cpu_kernels.h"
#include "cpu/ragged_slots.h"
#include "cpu/slot_writes.h"
#include "cpu/tensor_rows.h"
#include "dsa/kv_layout.h"
#include "dsa/parallel.h"

namespace dsa::cpu {
namespace {

// One token as the caller gives it; bf16 or f16.
struct LatentRow {
  const std::uint16_t* kv_c;  // [d_nope]
  std::int64_t d_nope;
  const std::uint16_t* k_pe;  // [d_rope]
  std::int64_t d_rope;
  DType dtype;
};

// What sets the two FP8 formats apart: where bytes stand, and how a group's scale is stored.
struct V32Format {
  using Layout = MlaV32Layout;
  static constexpr std::int64_t kScaleBytes = sizeof(float);
  static constexpr std::int64_t kPadBytes = 0;

  static Layout layout(std::int64_t) { return {}; }
  static void quantise(const float* x, std::uint8_t* codes, std::uint8_t* scale_bytes) {
    const float scale = quantise_group(x, Layout::kGroup, codes);
    std::memcpy(scale_bytes, &scale, sizeof(scale));
  }
  static float load_scale(const std::uint8_t* scale_bytes) {
    float scale;
    std::memcpy(&scale, scale_bytes, sizeof(scale));
    return scale;
  }
};

struct V4Format {
  using Layout = MlaV4Layout;
  static constexpr std::int64_t kScaleBytes = 1;
  static constexpr std::int64_t kPadBytes = Layout::kScaleBytes - Layout::kNumScales;

  static Layout layout(std::int64_t page_size) { return {page_size}; }
  static void quantise(const float* x, std::uint8_t* codes, std::uint8_t* scale_bytes) {
    *scale_bytes = quantise_group_ue8m0(x, Layout::kGroup, codes);
  }
  static float load_scale(const std::uint8_t* scale_bytes) { return ue8m0_decode(*scale_bytes); }
};

template <typename Format>
class MlaFp8Cache {
 public:
  explicit MlaFp8Cache(const TensorView& kv_cache)
      : kv_cache_(kv_cache), layout_(Format::layout(kv_cache.size(1))) {}

  void write(const LatentRow& row, std::int64_t slot) const {
    std::uint8_t* page = page_of(slot);
    const std::int64_t token = slot % kv_cache_.size(1);
    float values[Layout::kDimNope];
    load_as_float(row.kv_c, row.dtype, 1, Layout::kDimNope, values);
    std::uint8_t* scales = page + layout_.scales(token);
    for (std::int64_t group = 0; group < Layout::kNumScales; ++group) {
      const std::int64_t begin = group * Layout::kGroup;
      Format::quantise(values + begin, page + layout_.values(token) + begin,
                       scales + group * Format::kScaleBytes);
    }
    std::fill_n(scales + Layout::kNumScales * Format::kScaleBytes, Format::kPadBytes,
                std::uint8_t{0});
    write_rope(row, page + layout_.rope(token));
  }

  void read(std::int64_t slot, std::uint16_t* out) const {
    const std::uint8_t* page = page_of(slot);
    const std::int64_t token = slot % kv_cache_.size(1);
    const std::uint8_t* codes = page + layout_.values(token);
    const std::uint8_t* scales = page + layout_.scales(token);
    for (std::int64_t group = 0; group < Layout::kNumScales; ++group) {
      const float scale = Format::load_scale(scales + group * Format::kScaleBytes);
      for (std::int64_t i = group * Layout::kGroup; i < (group + 1) * Layout::kGroup; ++i) {
        out[i] = bf16_from_float(kE4m3Values[codes[i]] * scale);
      }
    }
    std::memcpy(out + Layout::kDimNope, page + layout_.rope(token), kRopeBytes);
  }

 private:
  using Layout = typename Format::Layout;
  static constexpr std::size_t kRopeBytes = Layout::kDimRope * sizeof(std::uint16_t);

  std::uint8_t* page_of(std::int64_t slot) const {
    return kv_cache_.ptr<std::uint8_t>() + slot / kv_cache_.size(1) * kv_cache_.stride(0);
  }

  // RoPE is stored as bf16 whatever the type of k_pe.
  static void write_rope(const LatentRow& row, std::uint8_t* bytes) {
    float values[Layout::kDimRope];
    std::uint16_t codes[Layout::kDimRope];
    load_as_float(row.k_pe, row.dtype, 1, Layout::kDimRope, values);
    store_from_float(values, Layout::kDimRope, DType::kBFloat16, codes);
    std::memcpy(bytes, codes, kRopeBytes);
  }

  TensorView kv_cache_;
  Layout layout_;
};

// bf16 or f16 rows of d_nope + d_rope, copied as they are.
class Mla16BitCache {
 public:
  explicit Mla16BitCache(const TensorView& kv_cache) : kv_cache_(kv_cache) {}

  void write(const LatentRow& row, std::int64_t slot) const {
    std::uint16_t* latent = latent_of(slot);
    std::copy_n(row.kv_c, row.d_nope, latent);
    std::copy_n(row.k_pe, row.d_rope, latent + row.d_nope);
  }

  void read(std::int64_t slot, std::uint16_t* out) const {
    std::copy_n(latent_of(slot), kv_cache_.size(3), out);
  }

 private:
  std::uint16_t* latent_of(std::int64_t slot) const {
    return kv_cache_.ptr<std::uint16_t>() + slot / kv_cache_.size(1) * kv_cache_.stride(0) +
           slot % kv_cache_.size(1) * kv_cache_.stride(1);
  }

  TensorView kv_cache_;
};

template <typename Body>
void with_cache_format(const TensorView& kv_cache, Body&& body) {
  if (kv_cache.dtype != DType::kUInt8) return body(Mla16BitCache(kv_cache));
  if (kv_cache.size(3) == MlaV32Layout::kTokenBytes) return body(MlaFp8Cache<V32Format>(kv_cache));
  body(MlaFp8Cache<V4Format>(kv_cache));
}

}  // namespace

Status mla_cache_write(const MlaCacheWriteParams& params) {
  const TensorRows kv_c(params.kv_c);
  const TensorRows k_pe(params.k_pe);
  const std::int64_t num_slots = params.kv_cache.size(0) * params.kv_cache.size(1);
  with_cache_format(params.kv_cache, [&](const auto& cache) {
    for_each_slot(params.slot_mapping, num_slots, kv_c.width() + k_pe.width(),
                  [&](std::int64_t token, std::int64_t slot) {
                    cache.write(
                        {kv_c.row<const std::uint16_t>(token), kv_c.width(),
                         k_pe.row<const std::uint16_t>(token), k_pe.width(), params.kv_c.dtype},
                        slot);
                  });
  });
  return {};
}

Status mla_cache_gather(const MlaCacheGatherParams& params) {
  const TensorRows out(params.out);
  const RaggedSlots slots(params.cu_seqlens,
                          {params.block_table, params.kv_cache.size(1), params.kv_cache.size(0)});
  with_cache_format(params.kv_cache, [&](const auto& cache) {
    const auto gather_row = [&](std::int64_t row) {
      std::uint16_t* values = out.row<std::uint16_t>(row);
      const std::int64_t slot = slots.slot(row);
      if (slot < 0) {
        std::fill_n(values, out.width(), std::uint16_t{0});
      } else {
        cache.read(slot, values);
      }
    };
    parallel_for(0, out.count(), row_grain(out.width()), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) gather_row(row);
    });
  });
  return {};
}

}  // namespace dsa::cpu
