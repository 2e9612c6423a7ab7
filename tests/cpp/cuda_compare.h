// SPDX-License-Identifier: Apache-2.0
// One call of an op on the CPU and on a GPU, through api.h, with the same inputs: what is written
// must agree, and nothing else may be written.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <list>
#include <string>
#include <vector>

#include "compare.h"
#include "cuda_device.h"
#include "dsa/api.h"

namespace dsa::test {

// ---- the tensors of each op ---------------------------------------------------------------------

template <typename P>
using Members = std::vector<TensorView P::*>;

inline Members<MqaLogitsParams> members(const MqaLogitsParams&) {
  using P = MqaLogitsParams;
  return {&P::q, &P::k, &P::k_scale, &P::weights, &P::k_start, &P::k_end, &P::out};
}
inline Members<PagedMqaLogitsParams> members(const PagedMqaLogitsParams&) {
  using P = PagedMqaLogitsParams;
  return {&P::q,           &P::kv_cache,      &P::weights, &P::context_lens,
          &P::block_table, &P::schedule_meta, &P::out};
}
inline Members<PagedMqaLogitsMetadataParams> members(const PagedMqaLogitsMetadataParams&) {
  using P = PagedMqaLogitsMetadataParams;
  return {&P::context_lens, &P::indices, &P::out};
}
inline Members<MqaTopkParams> members(const MqaTopkParams&) {
  using P = MqaTopkParams;
  return {&P::q,     &P::k,       &P::k_scale, &P::weights,  &P::k_start,
          &P::k_end, &P::indices, &P::scores,  &P::workspace};
}
inline Members<PagedMqaTopkParams> members(const PagedMqaTopkParams&) {
  using P = PagedMqaTopkParams;
  return {&P::q,           &P::kv_cache,      &P::weights, &P::context_lens,
          &P::block_table, &P::schedule_meta, &P::indices, &P::scores,
          &P::workspace};
}
inline Members<TopkSelectParams> members(const TopkSelectParams&) {
  using P = TopkSelectParams;
  return {&P::scores,      &P::row_starts,     &P::row_ends, &P::index_base,
          &P::block_table, &P::row_to_request, &P::indices,  &P::out_scores};
}
inline Members<MapToSlotsParams> members(const MapToSlotsParams&) {
  using P = MapToSlotsParams;
  return {&P::indices, &P::block_table, &P::row_to_request, &P::out};
}
inline Members<MergeTopkParams> members(const MergeTopkParams&) {
  using P = MergeTopkParams;
  return {&P::scores, &P::indices, &P::out_indices, &P::out_scores};
}
inline Members<SparseFwdParams> members(const SparseFwdParams&) {
  using P = SparseFwdParams;
  return {&P::q,           &P::kv,  &P::indices,    &P::attn_sink,
          &P::topk_length, &P::out, &P::max_logits, &P::lse};
}
inline Members<KvCacheFwdParams> members(const KvCacheFwdParams&) {
  using P = KvCacheFwdParams;
  return {&P::q,           &P::k_cache,           &P::block_table,   &P::cache_seqlens,
          &P::indices,     &P::attn_sink,         &P::extra_k_cache, &P::extra_indices,
          &P::topk_length, &P::extra_topk_length, &P::out,           &P::lse,
          &P::workspace};
}
inline Members<MergeAttnStatesParams> members(const MergeAttnStatesParams&) {
  using P = MergeAttnStatesParams;
  return {&P::outs, &P::lses, &P::out, &P::lse};
}
inline Members<HadamardParams> members(const HadamardParams&) {
  return {&HadamardParams::x, &HadamardParams::out};
}
inline Members<PerTokenCastParams> members(const PerTokenCastParams&) {
  using P = PerTokenCastParams;
  return {&P::x, &P::out, &P::scale};
}
inline Members<IndexerCacheWriteParams> members(const IndexerCacheWriteParams&) {
  using P = IndexerCacheWriteParams;
  return {&P::k, &P::kv_cache, &P::slot_mapping};
}
inline Members<IndexerCacheGatherParams> members(const IndexerCacheGatherParams&) {
  using P = IndexerCacheGatherParams;
  return {&P::kv_cache, &P::block_table, &P::cu_seqlens, &P::k, &P::k_scale};
}
inline Members<MlaCacheWriteParams> members(const MlaCacheWriteParams&) {
  using P = MlaCacheWriteParams;
  return {&P::kv_c, &P::k_pe, &P::kv_cache, &P::slot_mapping};
}
inline Members<MlaCacheGatherParams> members(const MlaCacheGatherParams&) {
  using P = MlaCacheGatherParams;
  return {&P::kv_cache, &P::block_table, &P::cu_seqlens, &P::out};
}

// ---- the same call on a GPU ---------------------------------------------------------------------

// The arguments of a call with all its tensors copied to the device, each as large as it is.
template <typename P>
class Mirror {
 public:
  explicit Mirror(const P& host, Guard guard = Guard::kExact) : params(host) {
    for (const auto member : members(host)) {
      TensorView& t = params.*member;
      if (!t.defined()) continue;
      buffers_.emplace_back(t.data, extent_bytes(t), guard);
      at_.push_back({member, &buffers_.back()});
      t.data = buffers_.back().data();
      t.device = kGpu;
    }
    params.launch.device = kGpu;
    workspaces.install(params.launch);
  }

  Bytes download(TensorView P::* member) const {
    for (const Entry& entry : at_) {
      if (entry.member == member) return entry.buffer->download();
    }
    return {};
  }
  bool intact() const {
    for (const DeviceBuffer& buffer : buffers_) {
      if (!buffer.intact()) return false;
    }
    return workspaces.intact();
  }

  P params;
  Workspaces workspaces;

 private:
  struct Entry {
    TensorView P::* member;
    const DeviceBuffer* buffer;
  };
  std::list<DeviceBuffer> buffers_;
  std::vector<Entry> at_;
};

template <typename P>
struct Loose {
  TensorView P::* member;
  Rule rule;
};

// Everything that a call can reach, on the device and on the host after the host's own call:
// outputs agree, inputs and what lies between rows are as they were.
template <typename P>
void expect_same_memory(const P& host, const Mirror<P>& mirror,
                        std::initializer_list<Loose<P>> loose) {
  int position = 0;
  for (const auto member : members(host)) {
    const TensorView& t = host.*member;
    const std::string what = std::string(P::kOp) + ", tensor " + std::to_string(position++);
    if (!t.defined() || t.numel() == 0) continue;
    Bytes got = mirror.download(member);
    const auto* expected = static_cast<const std::uint8_t*>(t.data);
    for (const Loose<P>& entry : loose) {
      if (entry.member != member) continue;
      expect_close(t, got.data(), expected, entry.rule, what);
      const auto size = static_cast<std::size_t>(element_size(t.dtype));
      for_each_element(t, [&](std::size_t at) { std::memcpy(&got[at], expected + at, size); });
    }
    std::size_t first = 0;
    while (first < got.size() && got[first] == expected[first]) ++first;
    EXPECT_EQ(first, got.size()) << what << ": the first byte that differs, of " << got.size();
  }
  EXPECT_TRUE(mirror.intact()) << P::kOp << ": a write outside of its tensors";
}

// Runs the op on the CPU and, with exact allocations and with canaries around them, on the GPU.
template <typename P>
void expect_like_cpu(Status (*op)(const P&), const P& host,
                     std::initializer_list<Loose<P>> loose = {}) {
  Mirror<P> exact(host, Guard::kExact);
  Mirror<P> guarded(host, Guard::kCanaries);
  for (Mirror<P>* mirror : {&exact, &guarded}) {
    const Status status = op(mirror->params);
    ASSERT_TRUE(status.ok()) << status.message();
    const cudaError_t error = cudaDeviceSynchronize();
    ASSERT_EQ(error, cudaSuccess) << P::kOp << ": " << cudaGetErrorString(error);
  }
  const Status status = op(host);
  ASSERT_TRUE(status.ok()) << status.message();
  expect_same_memory(host, exact, loose);
  expect_same_memory(host, guarded, loose);
}

}  // namespace dsa::test
