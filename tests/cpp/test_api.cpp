// SPDX-License-Identifier: Apache-2.0
// The public C++ API on plain buffers: each op once, by hand-worked numbers; the registry; what
// dispatch says when no kernel fits; DSA_FORCE_KERNEL and DSA_LOG.
#include "dsa/api.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "core/fp8.h"
#include "core/half.h"
#include "dispatch/registry.h"
#include "dsa/kv_layout.h"
#include "view.h"

namespace dsa {
namespace {

using test::view;
using Bytes = std::vector<std::uint8_t>;
using Floats = std::vector<float>;
using Halves = std::vector<std::uint16_t>;
using Ints = std::vector<std::int32_t>;

constexpr float kInf = std::numeric_limits<float>::infinity();

Bytes e4m3(const Floats& values) {
  Bytes codes;
  for (const float value : values) codes.push_back(e4m3_encode(value));
  return codes;
}

Halves bf16(const Floats& values) {
  Halves codes;
  for (const float value : values) codes.push_back(bf16_from_float(value));
  return codes;
}

// `n` zeros with the given values in front.
Floats padded(std::size_t n, Floats values) {
  values.resize(n, 0.0f);
  return values;
}

void expect_ok(const Status& status) { ASSERT_TRUE(status.ok()) << status.message(); }

// Sets an environment variable for the length of a test.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Environment() { unsetenv(name_); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
};

// Two queries of one head, D = 32, three keys: q = (2), (-1), keys (1), (3), (-2) in the first
// place.
struct Prefill {
  Bytes q = [] {
    Bytes codes = e4m3(padded(32, {2.0f}));
    const Bytes second = e4m3(padded(32, {-1.0f}));
    codes.insert(codes.end(), second.begin(), second.end());
    return codes;
  }();
  Bytes k = [] {
    Bytes codes;
    for (const float value : {1.0f, 3.0f, -2.0f}) {
      const Bytes row = e4m3(padded(32, {value}));
      codes.insert(codes.end(), row.begin(), row.end());
    }
    return codes;
  }();
  Floats k_scale = {1.0f, 0.5f, 3.0f};
  Floats weights = {1.0f, -2.0f};
  Ints start = {0, 1};
  Ints end = {2, 3};

  template <typename Params>
  void fill(Params& p) {
    p.q = view(q, {2, 1, 32}, DType::kFloat8E4M3);
    p.k = view(k, {3, 32}, DType::kFloat8E4M3);
    p.k_scale = view(k_scale, {3});
    p.weights = view(weights, {2, 1});
    p.k_start = view(start, {2});
    p.k_end = view(end, {2});
  }
};

// The same keys in a cache of two pages of two tokens: tokens 0, 1 in page 1, token 2 in page 0.
struct PagedKeys {
  Bytes cache = Bytes(2 * 2 * 36, 0xFF);
  Ints block_table = {1, 0};
  Ints lens = {3};

  explicit PagedKeys(const Prefill& flat) {
    const IndexerLayout layout{32, 2};
    for (int token = 0; token < 3; ++token) {
      std::uint8_t* page = cache.data() + (token < 2 ? 1 : 0) * layout.page_bytes();
      std::memcpy(page + layout.values(token % 2), flat.k.data() + token * 32, 32);
      std::memcpy(page + layout.scale(token % 2), &flat.k_scale[static_cast<std::size_t>(token)],
                  sizeof(float));
    }
  }
  TensorView kv_cache() { return view(cache, {2, 2, 1, 36}); }
};

// ---- indexer ------------------------------------------------------------------------------------

TEST(Api, MqaLogits) {
  Prefill in;
  Floats out(6, 7.0f);
  MqaLogitsParams p;
  in.fill(p);
  p.out = view(out, {2, 3});
  expect_ok(fp8_mqa_logits(p));
  EXPECT_EQ(out, (Floats{2.0f, 3.0f, -kInf, -kInf, -0.0f, -12.0f}));
}

TEST(Api, MqaTopk) {
  Prefill in;
  Ints indices(4, 7);
  Floats scores(4);
  MqaTopkParams p;
  in.fill(p);
  p.topk = 2;
  p.indices = view(indices, {2, 2});
  p.scores = view(scores, {2, 2});
  expect_ok(fp8_mqa_topk(p));
  EXPECT_EQ(indices, (Ints{0, 1, 1, 2}));
  EXPECT_EQ(scores, (Floats{2.0f, 3.0f, -0.0f, -12.0f}));
  p.topk = 1;
  p.indices = view(indices, {2, 1});
  p.scores = TensorView{};
  expect_ok(fp8_mqa_topk(p));
  EXPECT_EQ(indices[0], 1);
  EXPECT_EQ(indices[1], 1);
}

TEST(Api, PagedMqaLogits) {
  Prefill flat;
  PagedKeys in(flat);
  Floats out(2 * 4, 7.0f);
  PagedMqaLogitsParams p;
  p.q = view(flat.q, {1, 2, 1, 32}, DType::kFloat8E4M3);
  p.kv_cache = in.kv_cache();
  p.weights = view(flat.weights, {2, 1});
  p.context_lens = view(in.lens, {1});
  p.block_table = view(in.block_table, {1, 2});
  p.max_context_len = 4;
  p.out = view(out, {2, 4});
  expect_ok(fp8_paged_mqa_logits(p));
  EXPECT_EQ(out, (Floats{2.0f, 3.0f, 7.0f, 7.0f, -0.0f, -0.0f, -12.0f, 7.0f}));
}

TEST(Api, PagedMqaTopk) {
  Prefill flat;
  PagedKeys in(flat);
  Ints indices(2 * 2, 7);
  PagedMqaTopkParams p;
  p.q = view(flat.q, {1, 2, 1, 32}, DType::kFloat8E4M3);
  p.kv_cache = in.kv_cache();
  p.weights = view(flat.weights, {2, 1});
  p.context_lens = view(in.lens, {1});
  p.block_table = view(in.block_table, {1, 2});
  p.max_context_len = 4;
  p.topk = 2;
  p.indices = view(indices, {2, 2});
  expect_ok(fp8_paged_mqa_topk(p));
  EXPECT_EQ(indices, (Ints{0, 1, 0, 1}));
  p.return_slots = true;
  expect_ok(fp8_paged_mqa_topk(p));
  EXPECT_EQ(indices, (Ints{2, 3, 2, 3}));
}

TEST(Api, PagedMqaLogitsMetadata) {
  Ints lens = {256, 300, 0, 1};  // segments: 1, 2, 0, 1
  Ints out(3 * 2, 7);
  PagedMqaLogitsMetadataParams p;
  p.context_lens = view(lens, {4});
  p.block_kv = 64;
  p.num_sms = 2;
  p.out = view(out, {3, 2});
  expect_ok(get_paged_mqa_logits_metadata(p));
  EXPECT_EQ(out, (Ints{0, 0, 1, 1, 4, 0}));
}

// ---- selection ----------------------------------------------------------------------------------

TEST(Api, TopkSelect) {
  Floats scores = {1.0f, 5.0f, 5.0f, std::nanf(""), 5.0f, -kInf};
  Ints indices(4, 7);
  Floats kept(4);
  TopkSelectParams p;
  p.scores = view(scores, {1, 6});
  p.topk = 4;
  p.indices = view(indices, {1, 4});
  p.out_scores = view(kept, {1, 4});
  expect_ok(topk_select(p));
  EXPECT_EQ(indices, (Ints{0, 1, 2, 4}));
  EXPECT_EQ(kept, (Floats{1.0f, 5.0f, 5.0f, 5.0f}));
  Ints end = {2};
  p.row_ends = view(end, {1});
  expect_ok(topk_select(p));
  EXPECT_EQ(indices, (Ints{0, 1, -1, -1}));
  EXPECT_EQ(kept, (Floats{1.0f, 5.0f, -kInf, -kInf}));
}

TEST(Api, MapToSlots) {
  Ints indices = {0, 5, -1, 2};
  Ints block_table = {3, -1, 1};
  Ints out(4, 7);
  MapToSlotsParams p;
  p.indices = view(indices, {1, 4});
  p.block_table = view(block_table, {1, 3});
  p.page_size = 2;
  p.out = view(out, {1, 4});
  expect_ok(map_to_slots(p));
  EXPECT_EQ(out, (Ints{6, 3, -1, -1}));
}

TEST(Api, MergeTopk) {
  Floats scores = {1.0f, 4.0f, 4.0f, 9.0f};
  Ints indices = {8, 6, 2, -1};
  Ints out(3, 7);
  MergeTopkParams p;
  p.scores = view(scores, {1, 4});
  p.indices = view(indices, {1, 4});
  p.topk = 1;
  p.out_indices = view(out, {1, 1});
  expect_ok(merge_topk(p));
  EXPECT_EQ(out[0], 2);
  p.topk = 3;
  p.out_indices = view(out, {1, 3});
  expect_ok(merge_topk(p));
  EXPECT_EQ(out, (Ints{2, 6, 8}));
}

// ---- attention ----------------------------------------------------------------------------------

// One head of d_qk = d_v = 64 and two rows of a latent: logits 0 and ln 3, so weights 1/4 and 3/4.
struct Latent {
  Halves q = bf16(padded(64, {1.0f}));
  Halves kv = [] {
    Floats rows(2 * 64, 0.0f);
    rows[1] = 4.0f;       // row 0: k . q = 0, v[1] = 4
    rows[64] = 1.0f;      // row 1: k . q = 1
    rows[64 + 1] = 8.0f;  // v[1] = 8
    return bf16(rows);
  }();
  double scale = std::log(3.0);
  Halves out = Halves(64, 0x7FFF);
  Floats max_logits = {7.0f};
  Floats lse = {7.0f};

  void expect_result() const {
    EXPECT_NEAR(bf16_to_float(out[0]), 0.75f, 0.005f);
    EXPECT_NEAR(bf16_to_float(out[1]), 7.0f, 0.05f);
    EXPECT_EQ(bf16_to_float(out[2]), 0.0f);
    EXPECT_NEAR(lse[0], std::log(4.0), 1e-6);
  }
};

TEST(Api, SparseFwd) {
  Latent in;
  Ints indices = {1, -1, 0, 2, std::numeric_limits<std::int32_t>::max()};
  SparseFwdParams p;
  p.q = view(in.q, {1, 1, 64});
  p.kv = view(in.kv, {2, 1, 64});
  p.indices = view(indices, {1, 1, 5});
  p.sm_scale = in.scale;
  p.d_v = 64;
  p.out = view(in.out, {1, 1, 64});
  p.max_logits = view(in.max_logits, {1, 1});
  p.lse = view(in.lse, {1, 1});
  expect_ok(flash_mla_sparse_fwd(p));
  in.expect_result();
  EXPECT_NEAR(in.max_logits[0], std::log(3.0), 1e-6);

  Floats sink = {static_cast<float>(std::log(4.0))};  // as much again: half the output
  p.attn_sink = view(sink, {1});
  expect_ok(flash_mla_sparse_fwd(p));
  EXPECT_NEAR(bf16_to_float(in.out[1]), 3.5f, 0.02f);
  EXPECT_NEAR(in.lse[0], std::log(4.0), 1e-6);

  indices.assign(5, -1);
  expect_ok(flash_mla_sparse_fwd(p));
  EXPECT_EQ(in.out, Halves(64, 0));
  EXPECT_EQ(in.lse[0], kInf);
  EXPECT_EQ(in.max_logits[0], -kInf);
}

TEST(Api, KvCacheFwdSparseAndDense) {
  Latent in;
  Ints indices = {1, 0, 2};
  KvCacheFwdParams p;
  p.q = view(in.q, {1, 1, 1, 64});
  p.k_cache = view(in.kv, {2, 1, 1, 64});
  p.head_dim_v = 64;
  p.softmax_scale = in.scale;
  p.indices = view(indices, {1, 1, 3});
  p.out = view(in.out, {1, 1, 1, 64});
  p.lse = view(in.lse, {1, 1, 1});
  expect_ok(flash_mla_with_kvcache(p));
  in.expect_result();

  in.out.assign(64, 0x7FFF);
  Ints block_table = {1, 0, -1};
  Ints lens = {3};
  p.indices = TensorView{};
  p.block_table = view(block_table, {1, 3});
  p.cache_seqlens = view(lens, {1});
  expect_ok(flash_mla_with_kvcache(p));
  in.expect_result();
}

TEST(Api, MergeAttnStates) {
  Floats outs = {1.0f, 2.0f, 5.0f, 10.0f, std::nanf(""), std::nanf("")};
  Floats lses = {0.0f, static_cast<float>(std::log(3.0)), kInf};
  Floats out(2), lse(1);
  MergeAttnStatesParams p;
  p.outs = view(outs, {3, 1, 1, 2});
  p.lses = view(lses, {3, 1, 1});
  p.out = view(out, {1, 1, 2});
  p.lse = view(lse, {1, 1});
  expect_ok(merge_attn_states(p));
  EXPECT_FLOAT_EQ(out[0], 4.0f);
  EXPECT_FLOAT_EQ(out[1], 8.0f);
  EXPECT_FLOAT_EQ(lse[0], static_cast<float>(std::log(4.0)));
}

// ---- cache and quantisation ---------------------------------------------------------------------

TEST(Api, Hadamard) {
  Floats x = {1.0f, 2.0f, 3.0f, 4.0f};
  Floats out(4);
  HadamardParams p;
  p.x = view(x, {1, 4});
  p.out = view(out, {1, 4});
  expect_ok(hadamard_transform(p));
  EXPECT_EQ(out, (Floats{5.0f, -1.0f, -2.0f, 0.0f}));
}

TEST(Api, PerTokenCast) {
  Floats x = {896.0f, -1.0f, 0.0f};
  Bytes out(3, 0xFF);
  Floats scale(1);
  PerTokenCastParams p;
  p.x = view(x, {1, 3});
  p.out = view(out, {1, 3}, DType::kFloat8E4M3);
  p.scale = view(scale, {1, 1});
  expect_ok(per_token_cast_to_fp8(p));
  EXPECT_EQ(scale[0], 2.0f);
  EXPECT_EQ(out, e4m3({448.0f, -0.5f, 0.0f}));
}

TEST(Api, IndexerCacheWriteAndGather) {
  Floats k(2 * 4, 0.0f);
  k[0] = 448.0f;
  k[4] = -896.0f;
  Bytes cache(2 * 2 * 8, 0xFF);
  std::vector<std::int64_t> slots = {3, -1};
  IndexerCacheWriteParams p;
  p.k = view(k, {2, 4});
  p.kv_cache = view(cache, {2, 2, 1, 8});
  p.slot_mapping = view(slots, {2});
  expect_ok(indexer_k_quant_and_cache(p));
  slots = {0, 4};  // the last one is past the end
  p.k = view(k, {2, 4});
  expect_ok(indexer_k_quant_and_cache(p));

  Ints block_table = {1, 0};
  Ints cu_seqlens = {0, 3};
  Bytes gathered(4 * 4, 0xFF);
  Floats scales(4, -1.0f);
  IndexerCacheGatherParams g;
  g.kv_cache = p.kv_cache;
  g.block_table = view(block_table, {1, 2});
  g.cu_seqlens = view(cu_seqlens, {2});
  g.k = view(gathered, {4, 4}, DType::kFloat8E4M3);
  g.k_scale = view(scales, {4});
  expect_ok(gather_indexer_k_cache(g));
  EXPECT_EQ(gathered[4], e4m3_encode(448.0f));  // token 1: page 1, offset 1: slot 3
  EXPECT_EQ(scales[1], 1.0f);
  EXPECT_EQ(gathered[8], e4m3_encode(448.0f));  // token 2: slot 0
  EXPECT_EQ(scales[2], 1.0f);
  EXPECT_EQ(gathered[0], 0xFF);  // token 0: slot 2, never written
  EXPECT_TRUE(std::isnan(scales[0]));
  EXPECT_EQ(gathered[12], 0);  // row 3: of no request
  EXPECT_EQ(scales[3], 0.0f);
}

TEST(Api, MlaCacheWriteAndGather) {
  Halves kv_c = bf16(padded(512, {448.0f, 1.0f}));
  Halves k_pe = bf16(padded(64, {0.3f}));
  Bytes cache(656, 0xFF);
  Ints slots = {0};
  MlaCacheWriteParams p;
  p.kv_c = view(kv_c, {1, 512});
  p.k_pe = view(k_pe, {1, 64});
  p.kv_cache = view(cache, {1, 1, 1, 656});
  p.slot_mapping = view(slots, {1});
  expect_ok(mla_kv_quant_and_cache(p));
  float scale = 0.0f;
  std::memcpy(&scale, cache.data() + MlaV32Layout::scales(0), sizeof(scale));
  EXPECT_EQ(scale, 1.0f);
  EXPECT_EQ(cache[1], e4m3_encode(1.0f));

  Ints block_table = {0};
  Ints cu_seqlens = {0, 1};
  Halves out(576, 0x7FFF);
  MlaCacheGatherParams g;
  g.kv_cache = p.kv_cache;
  g.block_table = view(block_table, {1, 1});
  g.cu_seqlens = view(cu_seqlens, {2});
  g.out = view(out, {1, 576});
  expect_ok(gather_mla_kv_cache(g));
  EXPECT_EQ(bf16_to_float(out[0]), 448.0f);
  EXPECT_EQ(bf16_to_float(out[1]), 1.0f);
  EXPECT_EQ(out[512], k_pe[0]);
}

// ---- registry and dispatch ----------------------------------------------------------------------

TEST(Registry, IdsAreUniqueAndOpsComplete) {
  std::set<std::string> ids;
  std::set<std::string> ops;
  for (const KernelInfo& kernel : list_kernels()) {
    EXPECT_TRUE(ids.insert(kernel.id).second) << kernel.id;
    EXPECT_FALSE(kernel.takes.empty()) << kernel.id;
    if (kernel.target.type == DeviceType::kCpu) ops.insert(kernel.op);
  }
  const std::set<std::string> expected = {"fp8_mqa_logits",
                                          "fp8_paged_mqa_logits",
                                          "get_paged_mqa_logits_metadata",
                                          "fp8_mqa_topk",
                                          "fp8_paged_mqa_topk",
                                          "topk_select",
                                          "map_to_slots",
                                          "merge_topk",
                                          "flash_mla_sparse_fwd",
                                          "flash_mla_with_kvcache",
                                          "merge_attn_states",
                                          "hadamard_transform",
                                          "per_token_cast_to_fp8",
                                          "indexer_k_quant_and_cache",
                                          "gather_indexer_k_cache",
                                          "mla_kv_quant_and_cache",
                                          "gather_mla_kv_cache"};
  EXPECT_EQ(ops, expected);
}

// A GPU that is not there cannot be asked, and the reason is the runtime's: no GPU is needed here.
TEST(Registry, EveryKernelRefusesAnAbsentDevice) {
  const std::string unasked = "cudaDeviceGetAttribute: ";
  bool cuda = false;
  for (const KernelInfo& kernel : list_kernels()) cuda |= kernel.target.type == DeviceType::kCuda;
  const Device absent = {DeviceType::kCuda, 63};
  for (const KernelInfo& kernel : list_kernels()) {
    const std::string reason = runs_on(kernel.target, absent).reason;
    if (kernel.target.type == DeviceType::kCpu) {
      EXPECT_EQ(reason, std::string("takes cpu tensors, not cuda:63") +
                            (cuda ? "" : " (built without CUDA)"));
    } else {
      EXPECT_TRUE(reason.starts_with(unasked)) << kernel.id << ": " << reason;
      EXPECT_GT(reason.size(), unasked.size());
    }
  }
}

struct SmallSelect {
  Floats scores = {1.0f, 2.0f};
  Ints indices = {7};
  TopkSelectParams params;
  SmallSelect() {
    params.scores = view(scores, {1, 2});
    params.topk = 1;
    params.indices = view(indices, {1, 1});
  }
};

TEST(Dispatch, WrongArgumentsTouchNothing) {
  SmallSelect in;
  in.params.topk = 2;
  const Status status = topk_select(in.params);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "topk_select: out: expected int32 [R=1, k=2], got int32 [1, 1]");
  EXPECT_EQ(in.indices[0], 7);
}

// An index_head_dim that no kernel of any backend takes.
Status logits_of_48_dimensions() {
  Bytes q(48), k(48);
  Floats one = {1.0f}, out = {7.0f};
  Ints start = {0}, end = {1};
  MqaLogitsParams p;
  p.q = view(q, {1, 1, 48}, DType::kFloat8E4M3);
  p.k = view(k, {1, 48}, DType::kFloat8E4M3);
  p.k_scale = view(one, {1});
  p.weights = view(one, {1, 1});
  p.k_start = view(start, {1});
  p.k_end = view(end, {1});
  p.out = view(out, {1, 1});
  const Status status = fp8_mqa_logits(p);
  EXPECT_EQ(out[0], 7.0f);
  return status;
}

TEST(Dispatch, UnsupportedNamesEachCandidateAndItsReason) {
  const Status status = logits_of_48_dimensions();
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_NE(status.message().find("fp8_mqa_logits: no kernel of this build takes these arguments"),
            std::string::npos);
  EXPECT_NE(status.message().find("cpu_mqa_logits: index_head_dim 32, 64 or 128, not 48"),
            std::string::npos);
  for (const KernelInfo& kernel : list_kernels()) {
    if (kernel.op != "fp8_mqa_logits") continue;
    EXPECT_NE(status.message().find(kernel.id + ": "), std::string::npos);
  }
}

TEST(Dispatch, ADeviceWithoutKernels) {
  SmallSelect in;
  const Device other = {DeviceType::kOther, 0};
  in.params.scores.device = in.params.indices.device = in.params.launch.device = other;
  const Status status = topk_select(in.params);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_NE(status.message().find("cpu_topk_select: takes cpu tensors, not another device"),
            std::string::npos);
  EXPECT_EQ(in.indices[0], 7);
}

TEST(Dispatch, ADeviceThatNoKernelRunsOn) {
  SmallSelect in;
  const Device absent = {DeviceType::kCuda, 63};
  in.params.scores.device = in.params.indices.device = in.params.launch.device = absent;
  const Status status = topk_select(in.params);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  for (const KernelInfo& kernel : list_kernels()) {
    if (kernel.op != "topk_select") continue;
    const std::string reason = kernel.id + ": " + runs_on(kernel.target, absent).reason;
    EXPECT_NE(status.message().find(reason), std::string::npos) << status.message();
  }
  EXPECT_EQ(in.indices[0], 7);
}

TEST(Dispatch, ForceKernelOfThisOp) {
  const Environment force("DSA_FORCE_KERNEL", "cpu_topk_select");
  SmallSelect in;
  expect_ok(topk_select(in.params));
  EXPECT_EQ(in.indices[0], 1);
}

TEST(Dispatch, ForceKernelOfAnotherOpIsOfNoConcern) {
  const Environment force("DSA_FORCE_KERNEL", ",cpu_mqa_logits,,cpu_hadamard_transform,");
  SmallSelect in;
  expect_ok(topk_select(in.params));
  EXPECT_EQ(in.indices[0], 1);
}

TEST(Dispatch, ForceKernelThatDoesNotExist) {
  const Environment force("DSA_FORCE_KERNEL", "cpu_topk_select,cpu_topk_selekt");
  SmallSelect in;
  const Status status = topk_select(in.params);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message(),
            "DSA_FORCE_KERNEL: expected kernel ids of this build (python -m dsa_ext lists them), "
            "got cpu_topk_selekt");
  EXPECT_EQ(in.indices[0], 7);
}

TEST(Dispatch, ForceKernelThatCannot) {
  const Environment force("DSA_FORCE_KERNEL", "cpu_mqa_logits");
  const Status status = logits_of_48_dimensions();
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message(),
            "fp8_mqa_logits: no kernel of this build takes these arguments (DSA_FORCE_KERNEL is "
            "set; cpu_mqa_logits: index_head_dim 32, 64 or 128, not 48)");
}

TEST(Dispatch, LogNamesTheKernel) {
  SmallSelect in;
  testing::internal::CaptureStderr();
  expect_ok(topk_select(in.params));
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
  const Environment log("DSA_LOG", "1");
  testing::internal::CaptureStderr();
  expect_ok(topk_select(in.params));
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "dsa_ext: topk_select -> cpu_topk_select\n");
}

}  // namespace
}  // namespace dsa
