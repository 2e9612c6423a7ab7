// SPDX-License-Identifier: Apache-2.0
// The named-dimension checker, and what validate() says of wrong arguments. No tensor is read here:
// views have shapes and no data. tests/python/test_errors.py triggers every check through Python.
#include "dispatch/validate.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "dispatch/check.h"
#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa {
namespace {

constexpr DType kF32 = DType::kFloat32;
constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kF16 = DType::kFloat16;
constexpr DType kE4M3 = DType::kFloat8E4M3;
constexpr DType kU8 = DType::kUInt8;
constexpr DType kI32 = DType::kInt32;
constexpr Device kCpu{DeviceType::kCpu, 0};
constexpr Device kCuda0{DeviceType::kCuda, 0};
constexpr Device kCuda1{DeviceType::kCuda, 1};

TensorView tensor(DType dtype, std::initializer_list<std::int64_t> sizes, Device device = kCpu) {
  TensorView t;
  t.dtype = dtype;
  t.device = device;
  for (const std::int64_t size : sizes) t.sizes[t.ndim++] = size;
  std::int64_t stride = 1;
  for (int dim = t.ndim - 1; dim >= 0; --dim) {
    t.strides[dim] = stride;
    stride *= t.sizes[dim];
  }
  return t;
}

void expect_invalid(const Status& status, const std::string& message) {
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), message);
}

void expect_ok(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }

// ---- Check --------------------------------------------------------------------------------------

TEST(Check, BindsADimensionWhereItFirstAppears) {
  Check c("op", kCpu);
  c.tensor("a", tensor(kF32, {3, 5}), {kF32}, {"R", "N"});
  c.tensor("b", tensor(kF32, {5, 3}), {kF32}, {"N", "R"});
  EXPECT_TRUE(c.ok());
  EXPECT_EQ(c.dim("R"), 3);
  EXPECT_EQ(c.dim("N"), 5);
  EXPECT_EQ(c.dim("nobody"), 0);
  expect_ok(c.take());
}

TEST(Check, NamesBoundSizesAndLeavesOthersOpen) {
  Check c("op", kCpu);
  c.tensor("a", tensor(kF32, {3, 5}), {kF32}, {"R", "N"});
  c.tensor("b", tensor(kF32, {4, 7}), {kF32}, {"R", "M"});
  expect_invalid(c.take(), "op: b: expected float32 [R=3, M], got float32 [4, 7]");
}

TEST(Check, AHalfMatchedTensorDoesNotExplainItself) {
  Check c("op", kCpu);
  c.tensor("a", tensor(kF32, {3, 5, 2}), {kF32}, {"R", "N", "1"});
  EXPECT_EQ(c.dim("R"), 0);
  expect_invalid(c.take(), "op: a: expected float32 [R, N, 1], got float32 [3, 5, 2]");
}

TEST(Check, TheSameNameTwiceInOneTensorMustAgree) {
  Check c("op", kCpu);
  c.tensor("a", tensor(kF32, {3, 3}), {kF32}, {"N", "N"});
  EXPECT_TRUE(c.ok());
  c.tensor("b", tensor(kF32, {4, 5}), {kF32}, {"M", "M"});
  expect_invalid(c.take(), "op: b: expected float32 [M, M], got float32 [4, 5]");
}

TEST(Check, KeepsTheFirstFailure) {
  Check c("op", kCpu);
  c.that(false, "first", "peace", 1);
  c.that(false, "second", "war", std::string("2"));
  c.tensor("third", tensor(kF32, {1}), {kI32}, {"N"});
  c.absent("fourth", tensor(kF32, {1}), "ever");
  EXPECT_FALSE(c.ok());
  expect_invalid(c.take(), "op: first: expected peace, got 1");
}

TEST(Check, ListsEveryDtype) {
  Check c("op", kCpu);
  c.tensor("a", tensor(DType::kOther, {}), {kF32, kBF16, kF16}, {"N"});
  expect_invalid(c.take(),
                 "op: a: expected float32 or bfloat16 or float16 [N], got another dtype []");
}

TEST(Check, EveryDtypeHasItsTorchName) {
  EXPECT_STREQ(dtype_name(DType::kUndefined), "None");
  EXPECT_STREQ(dtype_name(kF32), "float32");
  EXPECT_STREQ(dtype_name(kBF16), "bfloat16");
  EXPECT_STREQ(dtype_name(kF16), "float16");
  EXPECT_STREQ(dtype_name(kE4M3), "float8_e4m3fn");
  EXPECT_STREQ(dtype_name(kU8), "uint8");
  EXPECT_STREQ(dtype_name(DType::kInt8), "int8");
  EXPECT_STREQ(dtype_name(kI32), "int32");
  EXPECT_STREQ(dtype_name(DType::kInt64), "int64");
  EXPECT_STREQ(dtype_name(DType::kFloat64), "float64");
  EXPECT_STREQ(dtype_name(DType::kFloat8E4M3Fnuz), "float8_e4m3fnuz");
  EXPECT_STREQ(dtype_name(DType::kFloat8E5M2), "float8_e5m2");
  EXPECT_STREQ(dtype_name(DType::kFloat8E8M0), "float8_e8m0fnu");
  EXPECT_STREQ(dtype_name(DType::kFloat4E2M1), "float4_e2m1fn_x2");
  EXPECT_STREQ(dtype_name(DType::kInt16), "int16");
  EXPECT_STREQ(dtype_name(DType::kUInt16), "uint16");
  EXPECT_STREQ(dtype_name(DType::kUInt32), "uint32");
  EXPECT_STREQ(dtype_name(DType::kUInt64), "uint64");
  EXPECT_STREQ(dtype_name(DType::kBool), "bool");
  EXPECT_STREQ(dtype_name(DType::kOther), "another dtype");
}

TEST(Check, MoreDimensionsThanAViewHolds) {
  TensorView t = tensor(kF32, {1, 1, 1, 1, 1, 1, 1, 1});
  t.ndim = 64;
  Check c("op", kCpu);
  c.tensor("a", t, {kF32}, {"R", "N"});
  expect_invalid(c.take(), "op: a: expected float32 [R, N], got float32 of 64 dimensions");
  Check absent("op", kCpu);
  absent.absent("a", t, "here");
  expect_invalid(absent.take(), "op: a: expected None here, got float32 of 64 dimensions");
}

TEST(Check, ATensorThatIsMissing) {
  Check c("op", kCpu);
  c.tensor("a", TensorView{}, {kF32}, {"N"});
  expect_invalid(c.take(), "op: a: expected float32 [N], got None");
}

TEST(Check, AnOptionalTensorMayBeMissingButNotWrong) {
  Check c("op", kCpu);
  c.optional("a", TensorView{}, DTypes{kF32}, Shape{"N"});
  EXPECT_TRUE(c.ok());
  c.optional("b", tensor(kF32, {2, 2}), DTypes{kF32}, Shape{"N"});
  expect_invalid(c.take(), "op: b: expected float32 [N], got float32 [2, 2]");
}

TEST(Check, ATensorThatMustBeAbsent) {
  Check c("op", kCpu);
  c.absent("a", TensorView{}, "without b");
  EXPECT_TRUE(c.ok());
  c.absent("a", tensor(kI32, {4}), "without b");
  expect_invalid(c.take(), "op: a: expected None without b, got int32 [4]");
}

TEST(Check, TwoShapesAreToldApartByTheirRank) {
  const auto check = [](std::initializer_list<std::int64_t> sizes) {
    Check c("op", kCpu);
    c.bind("B", 2);
    c.tensor("lens", tensor(kI32, sizes), {kI32}, {"B"}, {"B", "n"});
    return c.take();
  };
  expect_ok(check({2}));
  expect_ok(check({2, 9}));
  expect_invalid(check({3}), "op: lens: expected int32 [B=2] or [B=2, n], got int32 [3]");
  expect_invalid(check({3, 9}), "op: lens: expected int32 [B=2] or [B=2, n], got int32 [3, 9]");
  expect_invalid(check({2, 9, 1}),
                 "op: lens: expected int32 [B=2] or [B=2, n], got int32 [2, 9, 1]");
}

TEST(Check, ADimensionBoundTwiceIsNamedOnce) {
  Check c("op", kCpu);
  c.bind("R", 4);
  c.bind("R", 4);
  c.tensor("a", tensor(kF32, {5}), {kF32}, {"R"});
  expect_invalid(c.take(), "op: a: expected float32 [R=4], got float32 [5]");
}

TEST(Check, Devices) {
  EXPECT_EQ(device_name(kCpu), "cpu");
  EXPECT_EQ(device_name(kCuda1), "cuda:1");
  EXPECT_EQ(device_name({DeviceType::kOther, 3}), "another device");
  Check c("op", kCuda0);
  c.tensor("a", tensor(kF32, {2}, kCuda0), {kF32}, {"N"});
  EXPECT_TRUE(c.ok());
  c.tensor("b", tensor(kF32, {2}, kCuda1), {kF32}, {"N"});
  expect_invalid(c.take(), "op: b: expected a tensor on cuda:0, got one on cuda:1");
}

TEST(Check, StrideOfTheLastDimension) {
  TensorView t = tensor(kF32, {3, 5});
  t.strides[0] = 1;
  t.strides[1] = 3;
  Check c("op", kCpu);
  c.tensor("a", t, {kF32}, {"R", "N"}, Layout::kAnyStrides);
  EXPECT_TRUE(c.ok());
  c.tensor("a", t, {kF32}, {"R", "N"});
  expect_invalid(c.take(), "op: a: expected stride 1 in the last dimension, got strides [1, 3]");
}

TEST(Check, StridesThatDoNotMatter) {
  Check c("op", kCpu);
  TensorView vector = tensor(kF32, {7});
  vector.strides[0] = 2;  // a vector of scalars
  c.tensor("vector", vector, {kF32}, {"N"});
  TensorView column = tensor(kF32, {7, 1});
  column.strides[1] = 7;  // one column: its stride is never used
  c.tensor("column", column, {kF32}, {"N", "1"});
  TensorView rows = tensor(kF32, {7, 4});
  rows.strides[0] = 0;  // rows may lie anywhere
  c.tensor("rows", rows, {kF32}, {"N", "M"});
  expect_ok(c.take());
}

// ---- fp8_mqa_logits -----------------------------------------------------------------------------

MqaLogitsParams logits_params() {
  MqaLogitsParams p;
  p.q = tensor(kE4M3, {4, 64, 128});
  p.k = tensor(kE4M3, {100, 128});
  p.k_scale = tensor(kF32, {100});
  p.weights = tensor(kF32, {4, 64});
  p.k_start = tensor(kI32, {4});
  p.k_end = tensor(kI32, {4});
  p.out = tensor(kF32, {4, 100});
  return p;
}

TEST(ValidateMqaLogits, TakesWhatItShould) {
  MqaLogitsParams p = logits_params();
  expect_ok(validate(p));
  p.out = tensor(kBF16, {4, 100});
  expect_ok(validate(p));
  p.max_seqlen_k = 30;
  p.out = tensor(kBF16, {4, 30});
  expect_ok(validate(p));
}

TEST(ValidateMqaLogits, TheMessageOfTheDesign) {
  MqaLogitsParams p = logits_params();
  p.weights = tensor(kF32, {4, 32});
  expect_invalid(validate(p),
                 "fp8_mqa_logits: weights: expected float32 [S=4, H=64], got float32 [4, 32]");
}

TEST(ValidateMqaLogits, NoHeads) {
  MqaLogitsParams p = logits_params();
  p.q = tensor(kE4M3, {4, 0, 128});
  p.weights = tensor(kF32, {4, 0});
  expect_invalid(validate(p), "fp8_mqa_logits: q: expected H >= 1, got 0");
}

TEST(ValidateMqaLogits, TensorsOfTwoDevices) {
  MqaLogitsParams p = logits_params();
  p.k_end.device = kCuda1;
  expect_invalid(validate(p),
                 "fp8_mqa_logits: cu_seq_len_k_end: expected a tensor on cpu, got one on cuda:1");
  p = logits_params();
  p.launch.device = kCuda0;
  expect_invalid(validate(p), "fp8_mqa_logits: q: expected a tensor on cuda:0, got one on cpu");
}

TEST(ValidateMqaLogits, ScalarsOutOfRange) {
  MqaLogitsParams p = logits_params();
  p.max_seqlen_k = -1;
  expect_invalid(validate(p), "fp8_mqa_logits: max_seqlen_k: expected 0 to 2147483647, got -1");
  p.max_seqlen_k = std::numeric_limits<std::int64_t>::max();
  expect_invalid(validate(p),
                 "fp8_mqa_logits: max_seqlen_k: expected 0 to 2147483647, got 9223372036854775807");
}

TEST(ValidateMqaLogits, AMissingOutput) {
  MqaLogitsParams p = logits_params();
  p.out = TensorView{};
  expect_invalid(validate(p),
                 "fp8_mqa_logits: out: expected float32 or bfloat16 [S=4, L=100], got None");
}

// ---- paged caches -------------------------------------------------------------------------------

IndexerCacheWriteParams indexer_write_params() {
  IndexerCacheWriteParams p;
  p.k = tensor(kBF16, {6, 128});
  p.kv_cache = tensor(kU8, {10, 64, 1, 132});
  p.slot_mapping = tensor(DType::kInt64, {6});
  return p;
}

TEST(ValidateIndexerCache, PagesMayLieApart) {
  IndexerCacheWriteParams p = indexer_write_params();
  expect_ok(validate(p));
  p.kv_cache.strides[0] = 64 * 132 + 4;
  expect_ok(validate(p));
  p.kv_cache.strides[0] += 2;
  expect_invalid(
      validate(p),
      "indexer_k_quant_and_cache: kv_cache: expected a page stride that is a multiple of "
      "4 bytes, got 8454");
  p.kv_cache = tensor(kU8, {1, 1, 1, 132});
  p.kv_cache.strides[0] = p.kv_cache.strides[1] = 7;  // one page, one token: never used
  expect_ok(validate(p));
}

TEST(ValidateIndexerCache, APageIsOnePiece) {
  IndexerCacheWriteParams p = indexer_write_params();
  p.kv_cache.strides[1] = 264;
  expect_invalid(validate(p),
                 "indexer_k_quant_and_cache: kv_cache: expected tokens of a page back to back "
                 "(stride(1) equal to the last size), got stride(1) = 264");
  p.kv_cache = tensor(kU8, {10, 0, 1, 132});
  expect_invalid(validate(p),
                 "indexer_k_quant_and_cache: kv_cache: expected page_size >= 1, got 0");
}

TEST(ValidateIndexerCache, WidthFollowsTheKeys) {
  IndexerCacheWriteParams p = indexer_write_params();
  p.kv_cache = tensor(kU8, {10, 64, 1, 128});
  expect_invalid(validate(p),
                 "indexer_k_quant_and_cache: kv_cache: expected uint8 [pages, page_size, 1, "
                 "D+4=132], got uint8 [10, 64, 1, 128]");
}

TEST(ValidateIndexerCache, GatherTakesItsWidthFromTheCache) {
  IndexerCacheGatherParams p;
  p.kv_cache = tensor(kU8, {10, 64, 1, 68});
  p.block_table = tensor(kI32, {3, 5});
  p.cu_seqlens = tensor(kI32, {4});
  p.k = tensor(kE4M3, {20, 64});
  p.k_scale = tensor(kF32, {20});
  expect_ok(validate(p));
  p.k = tensor(kE4M3, {20, 128});
  expect_invalid(validate(p),
                 "gather_indexer_k_cache: out k: expected float8_e4m3fn [num_tokens, D=64], got "
                 "float8_e4m3fn [20, 128]");
  p.kv_cache = tensor(kU8, {10, 64, 68});
  expect_invalid(validate(p),
                 "gather_indexer_k_cache: kv_cache: expected uint8 [pages, page_size, 1, D+4], got "
                 "uint8 [10, 64, 68]");
}

TEST(ValidateMlaCache, ThreeFormats) {
  MlaCacheWriteParams p;
  p.kv_c = tensor(kBF16, {6, 512});
  p.k_pe = tensor(kBF16, {6, 64});
  p.slot_mapping = tensor(kI32, {6});
  p.kv_cache = tensor(kU8, {10, 64, 1, 656});
  expect_ok(validate(p));
  p.kv_cache = tensor(kBF16, {10, 64, 1, 576});
  expect_ok(validate(p));
  p.kv_cache = tensor(kF16, {10, 64, 1, 576});
  expect_invalid(validate(p),
                 "mla_kv_quant_and_cache: kv_cache: expected bfloat16 [pages, page_size, 1, "
                 "d_nope+d_rope=576], got float16 [10, 64, 1, 576]");
  p.kv_cache = tensor(DType::kInt8, {10, 64, 1, 656});
  expect_invalid(validate(p),
                 "mla_kv_quant_and_cache: kv_cache: expected uint8 [pages, page_size, 1, 656], got "
                 "int8 [10, 64, 1, 656]");
  p.kv_cache = tensor(kU8, {10, 64, 1, 584});
  expect_invalid(validate(p),
                 "mla_kv_quant_and_cache: kv_cache: expected uint8 [pages, page_size, 1, 656], got "
                 "uint8 [10, 64, 1, 584]");
  p.kv_c = tensor(kBF16, {6, 448});
  expect_ok(validate(p));
  p.slot_mapping = tensor(kI32, {7});
  expect_invalid(validate(p),
                 "mla_kv_quant_and_cache: slot_mapping: expected int32 or int64 [T=6], got int32 "
                 "[7]");
}

// ---- selection ----------------------------------------------------------------------------------

TopkSelectParams select_params() {
  TopkSelectParams p;
  p.scores = tensor(kF32, {6, 1000});
  p.topk = 64;
  p.indices = tensor(kI32, {6, 64});
  return p;
}

TEST(ValidateTopkSelect, OptionalTensors) {
  TopkSelectParams p = select_params();
  expect_ok(validate(p));
  p.row_starts = p.row_ends = p.index_base = tensor(kI32, {6});
  p.out_scores = tensor(kF32, {6, 64});
  expect_ok(validate(p));
  p.row_ends = tensor(kI32, {5});
  expect_invalid(validate(p), "topk_select: row_ends: expected int32 [R=6], got int32 [5]");
}

TEST(ValidateTopkSelect, ScoresOfAnyStrides) {
  TopkSelectParams p = select_params();
  p.scores.strides[0] = 1;
  p.scores.strides[1] = 6;
  expect_ok(validate(p));
  p.indices.strides[1] = 2;
  expect_invalid(validate(p),
                 "topk_select: out: expected stride 1 in the last dimension, got strides [64, 2]");
}

TEST(ValidateTopkSelect, RowsAndRequests) {
  TopkSelectParams p = select_params();
  p.block_table = tensor(kI32, {3, 20});
  p.page_size = 64;
  expect_ok(validate(p));
  p.block_table = tensor(kI32, {4, 20});
  expect_invalid(validate(p),
                 "topk_select: block_table: expected a number of rows that divides the rows of the "
                 "input, or row_to_request, got 4 for 6 rows");
  p.row_to_request = tensor(kI32, {6});
  expect_ok(validate(p));
  p.row_to_request = tensor(kI32, {4});
  expect_invalid(validate(p), "topk_select: row_to_request: expected int32 [R=6], got int32 [4]");
  p.block_table = TensorView{};
  expect_invalid(validate(p),
                 "topk_select: row_to_request: expected None without block_table, got int32 [4]");
}

TEST(ValidateTopkSelect, NoRowsNeedNoRequests) {
  TopkSelectParams p = select_params();
  p.scores = tensor(kF32, {0, 1000});
  p.indices = tensor(kI32, {0, 64});
  p.block_table = tensor(kI32, {0, 20});
  p.page_size = 64;
  expect_ok(validate(p));
}

// ---- attention ----------------------------------------------------------------------------------

KvCacheFwdParams decode_params() {
  KvCacheFwdParams p;
  p.q = tensor(kBF16, {2, 1, 128, 576});
  p.k_cache = tensor(kU8, {10, 64, 1, 656});
  p.head_dim_v = 512;
  p.softmax_scale = 0.1;
  p.is_fp8_kvcache = true;
  p.indices = tensor(kI32, {2, 1, 2048});
  p.out = tensor(kBF16, {2, 1, 128, 512});
  p.lse = tensor(kF32, {2, 128, 1});
  return p;
}

TEST(ValidateKvCacheFwd, EightBitDtypesAreBytes) {
  KvCacheFwdParams p = decode_params();
  for (const DType dtype : {kU8, DType::kInt8, kE4M3}) {
    p.k_cache.dtype = dtype;
    expect_ok(validate(p));
  }
  p.k_cache.dtype = kBF16;
  expect_invalid(validate(p),
                 "flash_mla_with_kvcache: k_cache: expected uint8 or int8 or float8_e4m3fn [pages, "
                 "page_size, 1, 656], got bfloat16 [10, 64, 1, 656]");
}

TEST(ValidateKvCacheFwd, SparseAndDenseArguments) {
  KvCacheFwdParams p = decode_params();
  p.topk_length = tensor(kI32, {2});
  expect_ok(validate(p));
  p.topk_length = tensor(kI32, {2, 1});
  expect_ok(validate(p));
  p.causal = true;
  expect_invalid(validate(p),
                 "flash_mla_with_kvcache: causal: expected False with indices, got True");
  p.indices = TensorView{};
  expect_invalid(validate(p),
                 "flash_mla_with_kvcache: indices, block_table: expected one of them (sparse or "
                 "dense), got None");
  p.block_table = tensor(kI32, {2, 9});
  expect_invalid(validate(p),
                 "flash_mla_with_kvcache: topk_length: expected None in dense mode (indices=None), "
                 "got int32 [2, 1]");
  p.topk_length = TensorView{};
  p.cache_seqlens = tensor(kI32, {2});
  expect_ok(validate(p));
}

TEST(ValidateKvCacheFwd, TheSecondCacheComesWhole) {
  KvCacheFwdParams p = decode_params();
  p.extra_k_cache = tensor(kU8, {7, 2, 1, 656});
  expect_invalid(validate(p),
                 "flash_mla_with_kvcache: extra_indices_in_kvcache: expected int32 [b=2, s_q=1, "
                 "extra_topk], got None");
  p.extra_indices = tensor(kI32, {2, 1, 128});
  expect_ok(validate(p));
  p.extra_k_cache = tensor(kU8, {7, 2, 1, 584});
  expect_invalid(validate(p),
                 "flash_mla_with_kvcache: extra_k_cache: expected uint8 or int8 or float8_e4m3fn "
                 "[extra_pages, extra_page_size, 1, 656], got uint8 [7, 2, 1, 584]");
  p.extra_k_cache = TensorView{};
  expect_invalid(validate(p),
                 "flash_mla_with_kvcache: extra_indices_in_kvcache: expected None without "
                 "extra_k_cache, got int32 [2, 1, 128]");
}

TEST(ValidateKvCacheFwd, ScaleMustBeFinite) {
  KvCacheFwdParams p = decode_params();
  p.softmax_scale = std::numeric_limits<double>::infinity();
  expect_invalid(validate(p),
                 "flash_mla_with_kvcache: softmax_scale: expected a finite number, got inf");
  p.softmax_scale = 0.0;
  expect_ok(validate(p));
}

TEST(ValidateSparseFwd, OutputsByName) {
  SparseFwdParams p;
  p.q = tensor(kF16, {5, 16, 576});
  p.kv = tensor(kF16, {100, 1, 576});
  p.indices = tensor(kI32, {5, 1, 64});
  p.sm_scale = 0.1;
  p.d_v = 512;
  p.out = tensor(kF16, {5, 16, 512});
  p.max_logits = tensor(kF32, {5, 16});
  p.lse = tensor(kF32, {5, 16});
  expect_ok(validate(p));
  p.max_logits = tensor(kF32, {16, 5});
  expect_invalid(validate(p),
                 "flash_mla_sparse_fwd: out max_logits: expected float32 [s_q=5, h_q=16], got "
                 "float32 [16, 5]");
  p.kv = tensor(kBF16, {100, 1, 576});
  expect_invalid(validate(p),
                 "flash_mla_sparse_fwd: kv: expected float16 [s_kv, 1, d_qk=576] or [pages, "
                 "page_size, 1, d_qk=576], got bfloat16 [100, 1, 576]");
}

TEST(ValidateMergeAttnStates, OutputIsLikeOnePart) {
  MergeAttnStatesParams p;
  p.outs = tensor(kBF16, {3, 20, 16, 512});
  p.lses = tensor(kF32, {3, 20, 16});
  p.out = tensor(kBF16, {20, 16, 512});
  p.lse = tensor(kF32, {20, 16});
  expect_ok(validate(p));
  p.out.dtype = kF32;
  expect_invalid(validate(p),
                 "merge_attn_states: out: expected bfloat16 [s=20, h=16, d=512], got float32 [20, "
                 "16, 512]");
}

// ---- ops over rows of any rank ------------------------------------------------------------------

TEST(ValidateHadamard, AnyRankOfPowersOfTwo) {
  HadamardParams p;
  for (const std::int64_t n : {1, 2, 128, 32768}) {
    p.x = p.out = tensor(kBF16, {2, 3, n});
    expect_ok(validate(p));
  }
  p.x = p.out = tensor(kBF16, {128});
  expect_ok(validate(p));
  for (const std::int64_t n : {0, 3, 96, 65536}) {
    p.x = p.out = tensor(kBF16, {2, n});
    expect_invalid(validate(p),
                   "hadamard_transform: x: expected a last dimension that is a power of two from 1 "
                   "to 32768, got " +
                       std::to_string(n));
  }
  p.x = p.out = tensor(kBF16, {});
  expect_invalid(validate(p),
                 "hadamard_transform: x: expected float32, bfloat16 or float16 [..., n], got "
                 "bfloat16 []");
}

TEST(ValidateHadamard, OutputOnAnotherDevice) {
  HadamardParams p;
  p.x = tensor(kF32, {2, 64});
  p.out = tensor(kF32, {2, 64}, kCuda0);
  expect_invalid(validate(p),
                 "hadamard_transform: out: expected a tensor on the device of x, got cuda:0");
}

TEST(ValidateHadamard, AnyFiniteScale) {
  HadamardParams p;
  p.x = p.out = tensor(kF32, {2, 64});
  for (const double scale : {0.0, -3.0, 1e30}) {
    p.scale = scale;
    expect_ok(validate(p));
  }
  p.scale = std::numeric_limits<double>::quiet_NaN();
  expect_invalid(validate(p), "hadamard_transform: scale: expected a finite number, got nan");
}

TEST(ValidateHadamard, AtMostEightDimensions) {
  HadamardParams p;
  p.x = p.out = tensor(kF32, {1, 1, 1, 1, 1, 1, 1, 64});
  expect_ok(validate(p));
  p.out.ndim = 9;
  expect_invalid(validate(p),
                 "hadamard_transform: out: expected a tensor like x, got float32 of 9 dimensions");
  p.x.ndim = 9;
  expect_invalid(validate(p), "hadamard_transform: x: expected at most 8 dimensions, got 9");
}

TEST(ValidatePerTokenCast, OneScaleForEachGroup) {
  PerTokenCastParams p;
  for (const auto& [n, groups] :
       {std::pair<std::int64_t, std::int64_t>{0, 0}, {1, 1}, {128, 1}, {129, 2}, {7168, 56}}) {
    p.x = tensor(kF32, {4, n});
    p.out = tensor(kE4M3, {4, n});
    p.scale = tensor(kF32, {4, groups});
    expect_ok(validate(p));
    p.scale = tensor(kF32, {4, groups + 1});
    expect_invalid(validate(p),
                   "per_token_cast_to_fp8: out scale: expected float32 [..., ceil(n / 128)], got "
                   "float32 [4, " +
                       std::to_string(groups + 1) + "]");
  }
}

}  // namespace
}  // namespace dsa
