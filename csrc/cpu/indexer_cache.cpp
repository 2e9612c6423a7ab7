// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <cstring>

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

constexpr std::int64_t kMaxHeadDim = 128;  // one scale a token

// Where the value bytes and the scale bytes of each slot stand.
class IndexerPages {
 public:
  explicit IndexerPages(const TensorView& kv_cache)
      : kv_cache_(kv_cache),
        layout_{kv_cache.size(3) - IndexerLayout::kScaleBytes, kv_cache.size(1)} {}

  std::int64_t num_slots() const { return kv_cache_.size(0) * layout_.page_size; }
  std::int64_t head_dim() const { return layout_.head_dim; }

  std::uint8_t* values(std::int64_t slot) const {
    return page(slot) + layout_.values(slot % layout_.page_size);
  }
  std::uint8_t* scale(std::int64_t slot) const {
    return page(slot) + layout_.scale(slot % layout_.page_size);
  }

 private:
  std::uint8_t* page(std::int64_t slot) const {
    return kv_cache_.ptr<std::uint8_t>() + slot / layout_.page_size * kv_cache_.stride(0);
  }

  TensorView kv_cache_;
  IndexerLayout layout_;
};

}  // namespace

Status indexer_cache_write(const IndexerCacheWriteParams& params) {
  const IndexerPages pages(params.kv_cache);
  const TensorRows keys(params.k);
  const std::int64_t head_dim = pages.head_dim();
  for_each_slot(params.slot_mapping, pages.num_slots(), head_dim,
                [&](std::int64_t token, std::int64_t slot) {
                  float key[kMaxHeadDim];
                  keys.load(token, key);
                  std::uint8_t* codes = pages.values(slot);
                  const float scale = params.use_ue8m0
                                          ? ue8m0_decode(quantise_group_ue8m0(key, head_dim, codes))
                                          : quantise_group(key, head_dim, codes);
                  std::memcpy(pages.scale(slot), &scale, sizeof(scale));
                });
  return {};
}

Status indexer_cache_gather(const IndexerCacheGatherParams& params) {
  const IndexerPages pages(params.kv_cache);
  const RaggedSlots slots(params.cu_seqlens,
                          {params.block_table, params.kv_cache.size(1), params.kv_cache.size(0)});
  const TensorRows keys(params.k);
  const std::int64_t head_dim = pages.head_dim();
  const auto gather_row = [&](std::int64_t row) {
    std::uint8_t* key = keys.row<std::uint8_t>(row);
    float& scale = params.k_scale.ptr<float>()[row * params.k_scale.stride(0)];
    const std::int64_t slot = slots.slot(row);
    if (slot < 0) {
      std::fill_n(key, head_dim, std::uint8_t{0});
      scale = 0.0f;
      return;
    }
    std::copy_n(pages.values(slot), head_dim, key);
    std::memcpy(&scale, pages.scale(slot), sizeof(scale));
  };
  parallel_for(0, keys.count(), row_grain(head_dim), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) gather_row(row);
  });
  return {};
}

}  // namespace dsa::cpu
