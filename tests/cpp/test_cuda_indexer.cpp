// SPDX-License-Identifier: Apache-2.0
// Indexer logits, their fused top-k, selection and index mapping: the CUDA backend against the CPU
// one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "arena.h"
#include "cuda_compare.h"
#include "cuda_device.h"

namespace dsa::test {
namespace {

constexpr DType kF32 = DType::kFloat32;
constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kF16 = DType::kFloat16;
constexpr DType kI32 = DType::kInt32;

class CudaIndexer : public CudaTest {};
class CudaSelection : public CudaTest {};

// ---- prefill ------------------------------------------------------------------------------------

struct PrefillShape {
  std::int64_t queries, heads, head_dim, keys;
};

const PrefillShape kPrefillShapes[] = {{1, 1, 32, 1},      {5, 3, 64, 77},     {3, 8, 128, 130},
                                       {17, 32, 128, 300}, {33, 64, 128, 517}, {9, 65, 64, 1000},
                                       {2, 128, 128, 900}, {0, 4, 32, 9},      {4, 4, 32, 0}};

// Inputs whose sums are exact, so that both backends see the same ties; `pad` between rows.
template <typename Params>
Params prefill(Arena& arena, const PrefillShape& s, std::int64_t pad, bool unit_scales) {
  Params p;
  const auto keys = static_cast<std::int32_t>(s.keys);
  p.q = arena.e4m3_integers({s.queries, s.heads, s.head_dim}, pad);
  p.k = arena.e4m3_integers({s.keys, s.head_dim}, pad);
  p.k_scale = unit_scales ? arena.floats(kF32, {s.keys}, 1.0f, 1.0f)
                          : arena.floats(kF32, {s.keys}, 0.1f, 2.0f);
  p.weights = arena.quarters({s.queries, s.heads}, pad);
  p.k_start = arena.hostile({s.queries}, keys / 3 + 1, 15);
  p.k_end = arena.hostile({s.queries}, keys, 15);
  return p;
}

void compare_prefill_logits(const char* kernel) {
  if (kernel != nullptr) setenv("DSA_FORCE_KERNEL", kernel, 1);
  for (const PrefillShape& shape : kPrefillShapes) {
    for (const std::int64_t pad : {0, 16, 3}) {
      for (const DType dtype : {kF32, kBF16}) {
        for (const std::int64_t width : {std::int64_t{0}, std::int64_t{13}, shape.keys + 70}) {
          for (const bool clean : {true, false}) {
            Arena arena(7);
            auto p = prefill<MqaLogitsParams>(arena, shape, pad, false);
            p.clean_logits = clean;
            p.max_seqlen_k = width;
            p.out = arena.empty(dtype, {shape.queries, width > 0 ? width : shape.keys}, pad);
            Mirror<MqaLogitsParams> mirror(p, Guard::kCanaries);
            const Status status = fp8_mqa_logits(mirror.params);
            ASSERT_TRUE(status.ok()) << status.message();
            expect_cuda(cudaDeviceSynchronize());
            unsetenv("DSA_FORCE_KERNEL");
            ASSERT_TRUE(fp8_mqa_logits(p).ok());
            expect_same_memory<MqaLogitsParams>(p, mirror,
                                                {{&MqaLogitsParams::out, Rule::kLogits}});
            if (kernel != nullptr) setenv("DSA_FORCE_KERNEL", kernel, 1);
          }
        }
      }
    }
  }
  unsetenv("DSA_FORCE_KERNEL");
}

// Why the device cannot run a kernel; empty if it can.
std::string refusal(const std::string& id) {
  for (const KernelInfo& kernel : list_kernels()) {
    if (kernel.id == id) return runs_on(kernel.target, kGpu).reason;
  }
  return "a kernel of this id";
}

TEST_F(CudaIndexer, PrefillLogits) { compare_prefill_logits(nullptr); }

TEST_F(CudaIndexer, PrefillLogitsOfWidenedKeys) { compare_prefill_logits("portable_mqa_logits"); }

TEST_F(CudaIndexer, PrefillLogitsOfNativeE4m3) {
  const char* const kernel = "portable_mqa_logits_e4m3";
  if (const std::string reason = refusal(kernel); !reason.empty()) {
    GTEST_SKIP() << "needs " << reason;
  }
  compare_prefill_logits(kernel);
}

TEST_F(CudaIndexer, PrefillTopk) {
  for (const PrefillShape& shape : kPrefillShapes) {
    for (const std::int64_t k : {1, 24, 700}) {
      for (const bool scores : {true, false}) {
        Arena arena(11);
        auto p = prefill<MqaTopkParams>(arena, shape, 16, true);
        p.topk = k;
        p.indices = arena.empty(kI32, {shape.queries, k}, 1);
        if (scores) p.scores = arena.empty(kF32, {shape.queries, k}, 1);
        expect_like_cpu<MqaTopkParams>(fp8_mqa_topk, p, {{&MqaTopkParams::scores, Rule::kEqual}});
      }
    }
  }
}

// ---- decode -------------------------------------------------------------------------------------

struct PagedShape {
  std::int64_t batch, next_n, heads, head_dim, page_size, table, pad;
};

const PagedShape kPagedShapes[] = {
    {1, 1, 64, 128, 64, 5, 0},  {3, 2, 64, 128, 64, 4, 64}, {4, 1, 3, 64, 7, 20, 4},
    {2, 3, 8, 32, 16, 9, 0},    {5, 8, 1, 128, 1, 50, 64},  {2, 1, 128, 128, 256, 2, 0},
    {2, 5, 17, 64, 100, 3, 12}, {0, 1, 4, 32, 4, 2, 0},     {2, 1, 4, 32, 4, 0, 0}};

template <typename Params>
Params paged(Arena& arena, const PagedShape& s, bool two_d, bool unit_scales) {
  Params p;
  const std::int64_t pages = s.batch * s.table / 2 + 1, rows = s.batch * s.next_n;
  const auto longest = static_cast<std::int32_t>(s.table * s.page_size);
  p.q = arena.e4m3_integers({s.batch, s.next_n, s.heads, s.head_dim}, s.pad);
  p.kv_cache = arena.empty_cache(DType::kUInt8, pages, s.page_size, s.head_dim + 4, s.pad);
  arena.fill_indexer_keys(p.kv_cache, unit_scales);
  p.weights = arena.quarters({rows, s.heads}, s.pad);
  p.context_lens = two_d ? arena.hostile({s.batch, s.next_n}, longest, 10, 3)
                         : arena.hostile({s.batch}, longest, 10);
  p.block_table = arena.hostile({s.batch, s.table}, static_cast<std::int32_t>(pages), 10, s.pad);
  p.max_context_len = s.table * s.page_size;
  return p;
}

TEST_F(CudaIndexer, PagedLogits) {
  for (const PagedShape& shape : kPagedShapes) {
    for (const bool two_d : {false, true}) {
      for (const bool clean : {false, true}) {
        for (const DType dtype : {kF32, kBF16}) {
          Arena arena(13);
          auto p = paged<PagedMqaLogitsParams>(arena, shape, two_d, false);
          p.clean_logits = clean;
          if (two_d) p.schedule_meta = arena.hostile({5, 2}, 3, 60);
          p.out = arena.empty(dtype, {shape.batch * shape.next_n, p.max_context_len}, 5);
          expect_like_cpu<PagedMqaLogitsParams>(fp8_paged_mqa_logits, p,
                                                {{&PagedMqaLogitsParams::out, Rule::kLogits}});
        }
      }
    }
  }
}

TEST_F(CudaIndexer, PagedTopk) {
  for (const PagedShape& shape : kPagedShapes) {
    for (const bool slots : {false, true}) {
      for (const std::int64_t k : {1, 24, 600}) {
        Arena arena(17);
        auto p = paged<PagedMqaTopkParams>(arena, shape, k == 24, true);
        p.topk = k;
        p.return_slots = slots;
        p.indices = arena.empty(kI32, {shape.batch * shape.next_n, k}, 1);
        if (k != 1) p.scores = arena.empty(kF32, {shape.batch * shape.next_n, k}, 1);
        expect_like_cpu<PagedMqaTopkParams>(fp8_paged_mqa_topk, p,
                                            {{&PagedMqaTopkParams::scores, Rule::kEqual}});
      }
    }
  }
}

TEST_F(CudaIndexer, PagedSchedule) {
  for (const std::int64_t batch : {0, 1, 7, 1500, 70000}) {
    for (const std::int64_t num_sms : {1, 7, 132}) {
      for (const std::int64_t next_n : {0, 1, 3}) {  // 0: one-dimensional lengths
        Arena arena(19);
        PagedMqaLogitsMetadataParams p;
        p.context_lens = next_n == 0 ? arena.hostile({batch}, 9000, 1)
                                     : arena.hostile({batch, next_n}, 9000, 1, 2);
        p.block_kv = 64;
        p.num_sms = num_sms;
        p.out = arena.empty(kI32, {num_sms + 1, 2});
        expect_like_cpu<PagedMqaLogitsMetadataParams>(get_paged_mqa_logits_metadata, p);
      }
    }
  }
}

// ---- selection ----------------------------------------------------------------------------------

enum class Content { kRandom, kEqual, kFew, kSpecial };

TensorView scores_of(Arena& arena, Content content, DType dtype, std::int64_t rows,
                     std::int64_t columns, std::int64_t pad) {
  TensorView t = arena.floats(dtype, {rows, columns}, -2.0f, 2.0f, pad);
  for_each_element(t, [&](std::size_t at) {
    std::uint8_t* element = static_cast<std::uint8_t*>(t.data) + at;
    float value = load_float(element, dtype);
    if (content == Content::kEqual) value = 0.5f;
    if (content == Content::kFew) value = std::round(value * 2.0f) / 2.0f;
    if (content == Content::kSpecial && arena.random.integer(0, 9) < 3) {
      const float specials[] = {kNaN, kInf, -kInf, 0.0f, -0.0f};
      value = specials[arena.random.integer(0, 4)];
    }
    if (dtype == kF32) {
      std::memcpy(element, &value, sizeof(value));
    } else {
      const std::uint16_t code = dtype == kF16 ? f16_from_float(value) : bf16_from_float(value);
      std::memcpy(element, &code, sizeof(code));
    }
  });
  return t;
}

TEST_F(CudaSelection, Topk) {
  for (const Content content :
       {Content::kRandom, Content::kEqual, Content::kFew, Content::kSpecial}) {
    for (const DType dtype : {kF32, kBF16, kF16}) {
      for (const std::int64_t columns : {0, 1, 77, 1000, 5003, 40000}) {
        for (const std::int64_t k : {1, 64, 2048}) {
          Arena arena(23);
          TopkSelectParams p;
          p.scores = scores_of(arena, content, dtype, 5, columns, columns % 2 == 0 ? 0 : 3);
          p.topk = k;
          if (k != 64) {
            const auto bound = static_cast<std::int32_t>(columns);
            p.row_starts = arena.hostile({5}, bound / 4, 20);
            p.row_ends = arena.hostile({5}, bound, 20);
          }
          p.indices = arena.empty(kI32, {5, k}, 1);
          if (k != 1) p.out_scores = arena.empty(kF32, {5, k}, 1);
          expect_like_cpu<TopkSelectParams>(topk_select, p,
                                            {{&TopkSelectParams::out_scores, Rule::kEqual}});
        }
      }
    }
  }
}

TEST_F(CudaSelection, TopkOfAnyStrides) {
  for (const std::int64_t columns : {90, 3000}) {
    Arena arena(29);
    TopkSelectParams p;
    p.scores = scores_of(arena, Content::kFew, kF32, columns, 6, 1);
    std::swap(p.scores.sizes[0], p.scores.sizes[1]);
    std::swap(p.scores.strides[0], p.scores.strides[1]);
    p.topk = 50;
    p.indices = arena.empty(kI32, {6, 50});
    expect_like_cpu<TopkSelectParams>(topk_select, p,
                                      {{&TopkSelectParams::out_scores, Rule::kEqual}});
    p.scores.strides[0] = 0;
    expect_like_cpu<TopkSelectParams>(topk_select, p,
                                      {{&TopkSelectParams::out_scores, Rule::kEqual}});
    p.scores.strides[1] = 0;
    expect_like_cpu<TopkSelectParams>(topk_select, p,
                                      {{&TopkSelectParams::out_scores, Rule::kEqual}});
  }
}

TEST_F(CudaSelection, TopkToSlots) {
  for (const std::int64_t page_size :
       {std::int64_t{1}, std::int64_t{7}, std::int64_t{64}, std::int64_t{kIntMax}}) {
    for (const bool rows_given : {false, true}) {
      for (const bool base_tensor : {false, true}) {
        Arena arena(31);
        TopkSelectParams p;
        p.scores = scores_of(arena, Content::kFew, kF32, 6, 300, 0);
        p.topk = 40;
        p.block_table = arena.hostile({3, 20}, 50, 15, 2);
        p.page_size = page_size;
        if (rows_given) p.row_to_request = arena.hostile({6}, 3, 15);
        if (base_tensor) {
          p.index_base = arena.hostile({6}, 30, 20);
        } else {
          p.index_base_scalar = 17;
        }
        p.indices = arena.empty(kI32, {6, 40});
        expect_like_cpu<TopkSelectParams>(topk_select, p,
                                          {{&TopkSelectParams::out_scores, Rule::kEqual}});
      }
    }
  }
}

TEST_F(CudaSelection, MergeTopk) {
  for (const Content content : {Content::kRandom, Content::kFew, Content::kSpecial}) {
    for (const DType dtype : {kF32, kBF16, kF16}) {
      for (const std::int64_t columns : {0, 1, 30, 600, 9000}) {
        for (const std::int64_t k : {1, 50, 3000}) {
          Arena arena(37);
          MergeTopkParams p;
          p.scores = scores_of(arena, content, dtype, 4, columns, 2);
          p.indices = arena.hostile({4, columns}, 500, 5, 1);
          p.topk = k;
          p.out_indices = arena.empty(kI32, {4, k}, 1);
          if (k != 1) p.out_scores = arena.empty(kF32, {4, k}, 1);
          expect_like_cpu<MergeTopkParams>(merge_topk, p,
                                           {{&MergeTopkParams::out_scores, Rule::kEqual}});
        }
      }
    }
  }
}

TEST_F(CudaSelection, MapToSlots) {
  for (const std::int64_t page_size :
       {std::int64_t{1}, std::int64_t{7}, std::int64_t{64}, std::int64_t{kIntMax}}) {
    for (const bool flat : {false, true}) {
      for (const bool rows_given : {false, true}) {
        Arena arena(41);
        MapToSlotsParams p;
        p.indices = flat ? arena.hostile({6, 50}, 400, 10, 3) : arena.hostile({3, 2, 50}, 400, 10);
        p.block_table = arena.hostile({3, 60}, 50, 15, 2);
        p.page_size = page_size;
        if (rows_given) p.row_to_request = arena.hostile({6}, 3, 15);
        p.out = flat ? arena.empty(kI32, {6, 50}, 1) : arena.empty(kI32, {3, 2, 50}, 1);
        expect_like_cpu<MapToSlotsParams>(map_to_slots, p);
      }
    }
  }
}

}  // namespace
}  // namespace dsa::test
