// SPDX-License-Identifier: Apache-2.0
// A CTA, or a cluster, of a Hopper GPU on the CPU, to find out about kernels where no GPU is:
// whether they compute what they should, hang, or read what is not there yet, under many schedules.
//
// Threads are fibres. Whatever can make progress is an actor: each warp, the copy engine and the
// tensor core of each warpgroup. The actor of the highest priority goes on until it waits, and
// priorities, drawn from a seed, change now and then: one schedule has a copy arrive at once and a
// warp lag a whole tile behind, another the reverse. What a GPU does asynchronously (cp.async, bulk
// and tensor copies, wgmma) is done when its actor's turn comes, at the latest when it is waited
// for. Until then a copy's destination holds NaNs, and products have read nothing of shared memory
// and written no sums: what is used or overwritten too early shows in the results.
//
// A cluster's CTAs take turns: one goes on until it waits for the others. Shared memory is NaNs
// before a CTA begins and when it has ended, also for what others read there.
//
// Not modelled: time, other clusters at the same time, caches, fences (of the proxies, of wgmma),
// what a relaxed barrier of the cluster leaves unordered, what a warpgroup's registers are, that
// `.aligned` wants warps converged, and operands of products in registers, which a compiler keeps
// until then.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "dsa/status.h"

namespace dsa::emulator {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

inline constexpr int kWarp = 32, kWarpgroup = 128;
inline constexpr std::size_t kSharedBytes = 227 * 1024;
inline constexpr int kNumSms = 3;  // of the device that launches are sized for

// Of launches from now on: another seed, another schedule.
void set_seed(std::uint64_t seed);

// Runs `kernel` in each thread of each CTA, one cluster, of so many CTAs along y, after another. An
// error if one cannot go on.
Status run_grid(Index3 grid, unsigned cluster, int threads, const std::function<void()>& kernel);

// ---- what a thread asks for; only from inside run_grid ----

int thread_index();
int num_threads();
Index3 cta_index();
Index3 grid_size();
std::uint8_t* shared_memory();  // of the CTA
unsigned cluster_rank();
unsigned last_cluster();  // CTAs of a cluster of the last launch; from anywhere
// The same place of another CTA's shared memory.
std::uint8_t* of_cta(const void* shared, unsigned rank);

// The CTA cannot go on.
[[noreturn]] void fail(const std::string& why);

// All lanes of a warp bring a value and have those of all.
const std::array<std::uint64_t, kWarp>& exchange(std::uint64_t value);

// bar.sync, bar.arrive and bar.red.or.
void barrier_sync(int barrier, int threads);
void barrier_arrive(int barrier, int threads);
bool barrier_any(int barrier, int threads, bool flag);

// barrier.cluster.
void cluster_arrive();
void cluster_wait();

void mbarrier_init(std::uint64_t& barrier, int arrivals);
void mbarrier_arrive(std::uint64_t& barrier, std::uint32_t count, std::uint32_t expected_bytes);
void mbarrier_wait(std::uint64_t& barrier, std::uint32_t parity);

// cp.async of this thread, in order.
void copy_async(void* to, const void* from, int bytes);
void zero_async(void* to, int bytes);
void arrive_after_copies(std::uint64_t& barrier);
void commit_copies();
void wait_copies(int pending);  // groups
// Of the copy engine, in any order: `copy` writes `bytes` bytes, of which `barrier` is told. Until
// then `poison` holds there.
void bulk_copy(std::uint64_t& barrier, std::uint32_t bytes, std::function<void()> copy);
void poison(void* to, std::size_t bytes);

// wgmma of this thread's warpgroup: `multiply` has what all its threads brought, by their number in
// the warpgroup.
struct Product {
  struct Operands {
    float* d = nullptr;
    std::array<std::uint32_t, 4> a = {};  // of registers
  };
  std::array<Operands, kWarpgroup> threads;
};
void wgmma_issue(const Product::Operands& own, std::function<void(const Product&)> multiply);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace dsa::emulator
