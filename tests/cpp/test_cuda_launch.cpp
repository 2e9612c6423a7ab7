// SPDX-License-Identifier: Apache-2.0
// How a call through api.h reaches a GPU: its stream, its workspace, the kernel it is forced to.
#include <gtest/gtest.h>

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
constexpr DType kI32 = DType::kInt32;

class CudaLaunch : public CudaTest {};

void expect_ok(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }

MqaTopkParams small_topk(Arena& arena) {
  MqaTopkParams p;
  p.q = arena.e4m3_integers({5, 8, 64});
  p.k = arena.e4m3_integers({300, 64});
  p.k_scale = arena.floats(kF32, {300}, 1.0f, 1.0f);
  p.weights = arena.quarters({5, 8});
  p.k_start = arena.ints({5}, 0, 20);
  p.k_end = arena.ints({5}, 200, 300);
  p.topk = 20;
  p.indices = arena.empty(kI32, {5, 20});
  return p;
}

TopkSelectParams small_select(Arena& arena) {
  TopkSelectParams p;
  p.scores = arena.floats(kF32, {4, 900}, -1.0f, 1.0f);
  p.topk = 30;
  p.indices = arena.empty(kI32, {4, 30});
  return p;
}

// One row over many keys: work that a kernel splits.
KvCacheFwdParams long_decode(Arena& arena) {
  KvCacheFwdParams p;
  p.q = arena.floats(DType::kBFloat16, {1, 1, 16, 576}, -0.5f, 0.5f);
  p.k_cache = arena.empty_cache(DType::kUInt8, 64, 64, 656, 0);
  arena.fill_latents(p.k_cache);
  p.head_dim_v = 512;
  p.softmax_scale = 0.04;
  p.is_fp8_kvcache = true;
  p.indices = arena.ints({1, 1, 4096}, 0, 4095);
  p.out = arena.empty(DType::kBFloat16, {1, 1, 16, 512});
  p.lse = arena.empty(kF32, {1, 16, 1});
  return p;
}

// ---- workspace ----------------------------------------------------------------------------------

TensorView bytes_on_device(const DeviceBuffer& buffer, std::int64_t bytes) {
  TensorView t;
  t.data = buffer.data();
  t.dtype = DType::kUInt8;
  t.device = kGpu;
  t.ndim = 1;
  t.sizes[0] = bytes;
  t.strides[0] = 1;
  return t;
}

// Without an allocator a kernel that needs memory says how much; with as much it runs, with less
// it does not.
template <typename P>
void check_workspace(Status (*op)(const P&), const P& host, std::initializer_list<Loose<P>> loose) {
  Mirror<P> mirror(host);
  Mirror<P> allocating(host);
  mirror.params.launch.allocate = nullptr;
  const std::string expected = std::string(P::kOp) + ": workspace: expected ";
  const Status none = op(mirror.params);
  ASSERT_EQ(none.code(), StatusCode::kInvalidArgument) << none.message();
  ASSERT_EQ(none.message().rfind(expected, 0), 0u) << none.message();
  const std::int64_t needed = std::atoll(none.message().c_str() + expected.size());
  ASSERT_GT(needed, 0) << none.message();
  ASSERT_LE(needed, kMaxWorkspaceBytes);

  const DeviceBuffer buffer(nullptr, static_cast<std::size_t>(needed), Guard::kCanaries);
  mirror.params.workspace = bytes_on_device(buffer, needed - 1);
  const Status small = op(mirror.params);
  EXPECT_EQ(small.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(small.message(), expected + "at least " + std::to_string(needed) +
                                 " bytes for this shape, got " + std::to_string(needed - 1));

  mirror.params.workspace = bytes_on_device(buffer, needed);
  expect_ok(op(mirror.params));
  expect_cuda(cudaDeviceSynchronize());
  EXPECT_TRUE(buffer.intact()) << "a write outside of the workspace";
  expect_ok(op(host));
  expect_same_memory(host, mirror, loose);
  EXPECT_EQ(mirror.workspaces.count(), 0u);

  expect_ok(op(allocating.params));
  expect_cuda(cudaDeviceSynchronize());
  EXPECT_EQ(allocating.workspaces.count(), 1u);
  expect_same_memory(host, allocating, loose);

  allocating.params.launch.allocate = [](std::int64_t, void*) -> void* { return nullptr; };
  EXPECT_EQ(op(allocating.params).code(), StatusCode::kInvalidArgument);
}

TEST_F(CudaLaunch, WorkspaceOfTopk) {
  Arena arena(3);
  check_workspace<MqaTopkParams>(fp8_mqa_topk, small_topk(arena), {});
}

TEST_F(CudaLaunch, WorkspaceOfDecode) {
  Arena arena(5);
  check_workspace<KvCacheFwdParams>(
      flash_mla_with_kvcache, long_decode(arena),
      {{&KvCacheFwdParams::out, Rule::kDecode}, {&KvCacheFwdParams::lse, Rule::kLse}});
}

TEST_F(CudaLaunch, WorkspaceOnAnotherDeviceOrMisaligned) {
  Arena arena(7);
  const MqaTopkParams host = small_topk(arena);
  Mirror<MqaTopkParams> mirror(host);
  const DeviceBuffer buffer(nullptr, 4096, Guard::kExact);
  mirror.params.workspace = bytes_on_device(buffer, 4000);
  mirror.params.workspace.data = static_cast<std::uint8_t*>(buffer.data()) + 4;
  EXPECT_EQ(fp8_mqa_topk(mirror.params).code(), StatusCode::kInvalidArgument);
  mirror.params.workspace = arena.empty(DType::kUInt8, {4096});
  EXPECT_EQ(fp8_mqa_topk(mirror.params).code(), StatusCode::kInvalidArgument);
}

// ---- streams ------------------------------------------------------------------------------------

TEST_F(CudaLaunch, WorkIsOrderedOnTheGivenStream) {
  Arena arena(11);
  const TopkSelectParams host = small_select(arena);
  Mirror<TopkSelectParams> mirror(host);
  const Stream stream;
  auto* const queue = static_cast<cudaStream_t>(stream.get());
  mirror.params.launch.stream = stream.get();
  // Zeros, the scores, and the call: what comes before it on its stream is what it reads.
  const std::size_t bytes = extent_bytes(host.scores);
  expect_cuda(cudaMemsetAsync(mirror.params.scores.data, 0, bytes, queue));
  expect_cuda(cudaMemcpyAsync(mirror.params.scores.data, host.scores.data, bytes,
                              cudaMemcpyHostToDevice, queue));
  expect_ok(topk_select(mirror.params));
  expect_cuda(cudaStreamSynchronize(queue));
  expect_ok(topk_select(host));
  expect_same_memory<TopkSelectParams>(host, mirror, {});
}

TEST_F(CudaLaunch, CallsAreCapturedIntoAGraph) {
  Arena arena(13);
  const MqaTopkParams host = small_topk(arena);
  Mirror<MqaTopkParams> mirror(host);
  const Stream stream;
  auto* const queue = static_cast<cudaStream_t>(stream.get());
  mirror.params.launch.stream = stream.get();
  expect_ok(fp8_mqa_topk(mirror.params));  // loads the kernels
  expect_cuda(cudaStreamSynchronize(queue));
  const DeviceBuffer workspace(nullptr, kMaxWorkspaceBytes, Guard::kCanaries);
  mirror.params.workspace = bytes_on_device(workspace, kMaxWorkspaceBytes);

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  expect_cuda(cudaStreamBeginCapture(queue, cudaStreamCaptureModeGlobal));
  expect_ok(fp8_mqa_topk(mirror.params));
  expect_cuda(cudaStreamEndCapture(queue, &graph));
  expect_cuda(cudaGraphInstantiate(&exec, graph, 0));
  const std::size_t bytes = extent_bytes(host.indices);
  for (int replay = 0; replay < 3; ++replay) {
    expect_cuda(cudaMemsetAsync(mirror.params.indices.data, kUntouched, bytes, queue));
    expect_cuda(cudaGraphLaunch(exec, queue));
    expect_cuda(cudaStreamSynchronize(queue));
    if (replay == 0) expect_ok(fp8_mqa_topk(host));
    expect_same_memory<MqaTopkParams>(host, mirror, {});
  }
  EXPECT_TRUE(workspace.intact());
  expect_cuda(cudaGraphExecDestroy(exec));
  expect_cuda(cudaGraphDestroy(graph));
}

// ---- dispatch -----------------------------------------------------------------------------------

TEST_F(CudaLaunch, AKernelOfTheCpuIsNotForcedOntoCudaTensors) {
  Arena arena(17);
  Mirror<TopkSelectParams> mirror(small_select(arena));
  setenv("DSA_FORCE_KERNEL", "cpu_topk_select", 1);
  const Status status = topk_select(mirror.params);
  unsetenv("DSA_FORCE_KERNEL");
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message(),
            "topk_select: no kernel of this build takes these arguments (DSA_FORCE_KERNEL is set; "
            "cpu_topk_select: takes cpu tensors, not cuda:0)");
}

TEST_F(CudaLaunch, TensorsOfTwoDevices) {
  Arena arena(19);
  const TopkSelectParams host = small_select(arena);
  Mirror<TopkSelectParams> mirror(host);
  mirror.params.scores = host.scores;
  const Status status = topk_select(mirror.params);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "topk_select: scores: expected a tensor on cuda:0, got one on cpu");
}

}  // namespace
}  // namespace dsa::test
