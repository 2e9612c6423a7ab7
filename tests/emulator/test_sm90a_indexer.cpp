// SPDX-License-Identifier: Apache-2.0
// The indexer's kernels of Hopper on the emulator, against the CPU backend.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "arena.h"
#include "cuda/cuda_kernels.h"
#include "dsa/api.h"
#include "emulated.h"

namespace dsa::test {
namespace {

constexpr DType kF32 = DType::kFloat32;

// `kernel` writes what the CPU does, of inputs whose sums are exact in any order, and nothing else.
template <typename Params>
void expect_like_cpu(Arena& arena, Params p, Support (*takes)(const Params&),
                     Status (*kernel)(const Params&), Status (*cpu)(const Params&)) {
  ASSERT_TRUE(takes(p).ok()) << takes(p).reason;
  Params emulated = p;
  emulated.out = arena.empty(p.out.dtype, {p.out.size(0), p.out.size(1)});
  expect_ok(cpu(p));
  for (const std::uint64_t seed : {1, 2}) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    emulator::set_seed(seed);
    expect_ok(kernel(emulated));
    expect_same(emulated.out, p.out, Rule::kEqual, "out");
  }
}

struct PrefillShape {
  std::int64_t queries, heads, head_dim, keys;
};

TEST(EmulatedIndexer, Prefill) {
  for (const PrefillShape& s : {PrefillShape{5, 3, 64, 77}, PrefillShape{17, 32, 128, 700},
                                PrefillShape{33, 64, 128, 517}, PrefillShape{9, 65, 32, 300}}) {
    for (const bool clean : {true, false}) {
      SCOPED_TRACE("heads " + std::to_string(s.heads) + ", clean " + std::to_string(clean));
      Arena arena(3);
      MqaLogitsParams p;
      const auto keys = static_cast<std::int32_t>(s.keys);
      p.q = arena.e4m3_integers({s.queries, s.heads, s.head_dim});
      p.k = arena.e4m3_integers({s.keys, s.head_dim});
      p.k_scale = arena.floats(kF32, {s.keys}, 1.0f, 1.0f);
      p.weights = arena.quarters({s.queries, s.heads});
      p.k_start = arena.hostile({s.queries}, keys / 3 + 1, 15);
      p.k_end = arena.hostile({s.queries}, keys, 15);
      p.clean_logits = clean;
      p.max_seqlen_k = clean ? 0 : s.keys + 70;
      p.out = arena.empty(kF32, {s.queries, clean ? s.keys : s.keys + 70});
      expect_like_cpu(arena, p, cuda::sm90a_mqa_logits_takes, cuda::sm90a_mqa_logits,
                      fp8_mqa_logits);
    }
  }
}

struct PagedShape {
  std::int64_t batch, next_n, heads, page_size, table;
};

TEST(EmulatedIndexer, Paged) {
  for (const PagedShape& s :
       {PagedShape{1, 1, 64, 64, 100}, PagedShape{5, 2, 64, 8, 90}, PagedShape{40, 1, 3, 16, 9},
        PagedShape{2, 8, 32, 256, 3}, PagedShape{3, 5, 128, 64, 5}}) {
    for (const bool two_d : {true, false}) {
      SCOPED_TRACE("heads " + std::to_string(s.heads) + ", 2-D " + std::to_string(two_d));
      Arena arena(5);
      PagedMqaLogitsParams p;
      const std::int64_t pages = s.batch * s.table / 2 + 1, rows = s.batch * s.next_n;
      const auto longest = static_cast<std::int32_t>(s.table * s.page_size);
      p.q = arena.e4m3_integers({s.batch, s.next_n, s.heads, 128});
      p.kv_cache = arena.empty_cache(DType::kUInt8, pages, s.page_size, 132, 0);
      arena.fill_indexer_keys(p.kv_cache, true);
      p.weights = arena.quarters({rows, s.heads});
      p.context_lens = two_d ? arena.hostile({s.batch, s.next_n}, longest, 10)
                             : arena.ints({s.batch}, longest / 2, longest);
      p.block_table = arena.hostile({s.batch, s.table}, static_cast<std::int32_t>(pages), 10);
      p.max_context_len = longest;
      p.clean_logits = two_d;
      p.out = arena.empty(kF32, {rows, longest});
      expect_like_cpu(arena, p, cuda::sm90a_paged_mqa_logits_takes, cuda::sm90a_paged_mqa_logits,
                      fp8_paged_mqa_logits);
    }
  }
}

}  // namespace
}  // namespace dsa::test
