// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <bitset>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <utility>
#include <vector>

namespace dsa::emulator {

namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr int kBarriers = 16;

// In the 64 bits of an mbarrier. A phase is complete when nothing is pending.
struct MbarrierState {
  std::uint16_t arrivals;  // of each phase
  std::uint16_t pending_arrivals;
  std::int32_t pending_bytes : 31;
  std::uint32_t parity : 1;  // of the current phase
};
static_assert(sizeof(MbarrierState) == sizeof(std::uint64_t));

MbarrierState load(const std::uint64_t& barrier) {
  MbarrierState state;
  std::memcpy(&state, &barrier, sizeof(state));
  return state;
}

struct CopyStep {  // of cp.async
  void* to = nullptr;
  const void* from = nullptr;  // nullptr: zeros
  int bytes = 0;
  std::uint64_t* barrier = nullptr;  // arrives instead
  bool ends_group = false;           // does nothing else
};

struct Thread {
  ucontext_t context{};
  std::unique_ptr<std::uint8_t[]> stack;
  bool is_done = false;
  const void* waits_for = nullptr;  // nullptr: it can go on
  std::uint64_t cluster_phase = 0;  // of its last arrival
  std::string waits_at;
  std::deque<CopyStep> copies;
  int copy_groups = 0;  // on their way
  std::uint64_t products_waited = 0;
  std::uint64_t products = 0;                 // issued
  std::vector<std::uint64_t> product_groups;  // products at each commit
};

struct Warp {
  std::array<std::uint64_t, kWarp> values[2];
  int arrived = 0;
  std::uint64_t exchanges = 0;
};

struct Barrier {
  int arrived = 0, threads = 0;
  std::bitset<1024> has_arrived;  // in this phase
  bool any = false, last_any = false;
  std::uint64_t phases = 0;
};

struct QueuedProduct {
  Product product;
  std::function<void(const Product&)> multiply;
  int brought = 0;
};

struct Warpgroup {
  std::deque<QueuedProduct> queue;  // not yet done, in order
  std::uint64_t done = 0;
};

struct BulkCopy {
  std::uint64_t* barrier;
  std::uint32_t bytes;
  std::function<void()> copy;
};

std::mt19937_64& random_engine() {
  static std::mt19937_64 engine;
  return engine;
}

struct Failure {};  // error_ says what

class Cta;

// barrier.cluster: complete when all threads that have not ended have arrived.
struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  std::uint64_t phases = 0;
  int alive = 0, arrived = 0;

  void complete();
};

class Cta {
 public:
  static Cta*& current() {
    static Cta* cta = nullptr;
    return cta;
  }

  Cta(Cluster& cluster, Index3 grid, int threads, const std::function<void()>& kernel)
      : cluster_(cluster),
        grid_(grid),
        kernel_(kernel),
        image_(kSharedBytes),
        threads_(static_cast<std::size_t>(threads)),
        warps_(threads_.size() / kWarp),
        warpgroups_((threads_.size() + kWarpgroup - 1) / kWarpgroup) {
    for (Thread& t : threads_)
      t.stack = std::make_unique_for_overwrite<std::uint8_t[]>(kStackBytes);
    priorities_.resize(warps_.size() + 1 + warpgroups_.size());
    order_.resize(priorities_.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
  }

  void begin(Index3 index, unsigned rank) {
    index_ = index;
    rank_ = rank;
    poison(image_.data(), kSharedBytes);
    for (std::size_t actor = 0; actor < priorities_.size(); ++actor) change_priority(actor);
    for (Thread& t : threads_) {
      auto stack = std::move(t.stack);
      t = Thread{};
      t.stack = std::move(stack);
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = kStackBytes;
      t.context.uc_link = &scheduler_;
      makecontext(&t.context, &Cta::enter, 0);
    }
    for (Warp& warp : warps_) warp = {};
    for (Warpgroup& warpgroup : warpgroups_) warpgroup = {};
    barriers_ = {};
    mbarriers_.clear();
    error_.reset();
    alive_ = num_threads();
  }

  bool is_done() const { return alive_ == 0; }
  bool can_go_on() const {
    return std::any_of(threads_.begin(), threads_.end(),
                       [](const Thread& t) { return !t.is_done && t.waits_for == nullptr; });
  }
  const std::optional<std::string>& error() const { return error_; }
  unsigned rank() const { return rank_; }
  std::uint8_t* image() { return this == current() ? shared_memory() : image_.data(); }

  // Until it is done or waits for others.
  void go_on() {
    current() = this;
    std::memcpy(shared_memory(), image_.data(), kSharedBytes);
    while (!error_ && alive_ > 0) {
      if (random() % kTurnsPerChange == 0) change_priority(random() % priorities_.size());
      try {
        if (!advance()) break;
      } catch (const Failure&) {
      }
    }
    if (!error_ && is_done()) {
      const std::string left = left_over();
      if (!left.empty()) error_ = left;
    }
    std::memcpy(image_.data(), shared_memory(), kSharedBytes);
    if (is_done()) poison(image_.data(), kSharedBytes);
    current() = nullptr;
  }

  std::string who_waits() const {
    std::string text;
    std::string before;
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      if (threads_[i].is_done || threads_[i].waits_at == before) continue;
      before = threads_[i].waits_at;
      text += "thread " + std::to_string(i) + " and on at " + before + "; ";
    }
    return text;
  }

  void wake(const void* what) {
    for (Thread& t : threads_) {
      if (t.waits_for == what) t.waits_for = nullptr;
    }
  }

  // ---- the cluster ----
  void cluster_arrive() {
    if (own().cluster_phase > cluster_.phases) fail("arrives twice at the cluster's barrier");
    own().cluster_phase = cluster_.phases + 1;
    ++cluster_.arrived;
    cluster_.complete();
  }
  void cluster_wait() {
    const std::uint64_t phase = own().cluster_phase;
    wait(&cluster_, [&] { return cluster_.phases >= phase; }, "cluster barrier");
  }
  std::uint8_t* of_cta(const void* shared, unsigned rank) {
    if (rank >= cluster_.ctas.size()) fail("no CTA " + std::to_string(rank) + " in the cluster");
    const auto byte = static_cast<const std::uint8_t*>(shared) - shared_memory();
    return cluster_.ctas[rank]->image() + byte;
  }

  // ---- threads ----
  int thread() const { return running_; }
  int num_threads() const { return static_cast<int>(threads_.size()); }
  Index3 index() const { return index_; }
  Index3 grid() const { return grid_; }

  // Of a thread, that never goes on; or of the copy engine or a tensor core.
  void fail(const std::string& why) {
    const std::string who =
        running_ >= 0 ? "thread " + std::to_string(running_) : "a copy or a product";
    if (!error_) error_ = who + ": " + why;
    if (running_ < 0) throw Failure{};
    swap_out();
  }

  template <typename IsThere>
  void wait(const void* what, IsThere&& is_there, const char* name, std::uint64_t detail = 0) {
    while (!is_there()) {
      own().waits_for = what;
      own().waits_at = std::string(name) + " " + std::to_string(detail);
      swap_out();
    }
  }

  const std::array<std::uint64_t, kWarp>& exchange(std::uint64_t value) {
    Warp& warp = warps_[static_cast<std::size_t>(running_ / kWarp)];
    const std::uint64_t own = warp.exchanges;
    auto& values = warp.values[own % 2];
    values[static_cast<std::size_t>(running_ % kWarp)] = value;
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      ++warp.exchanges;
      wake(&warp);
    } else {
      wait(&warp, [&] { return warp.exchanges != own; }, "warp");
    }
    return values;
  }

  // Of this thread's arrival; the number of phases that are complete when this one is.
  std::uint64_t arrive(int id, int threads, bool flag) {
    Barrier& barrier = barriers_[static_cast<std::size_t>(id)];
    const std::uint64_t phase = barrier.phases + 1;
    const auto self = static_cast<std::size_t>(running_);
    if (barrier.has_arrived[self]) fail("arrives twice at barrier " + std::to_string(id));
    if (barrier.arrived > 0 && barrier.threads != threads) {
      fail("another number of threads at barrier " + std::to_string(id));
    }
    barrier.has_arrived.set(self);
    barrier.threads = threads;
    barrier.any |= flag;
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      barrier.has_arrived.reset();
      barrier.last_any = barrier.any;
      barrier.any = false;
      barrier.phases = phase;
      wake(&barrier);
    }
    return phase;
  }

  bool sync(int id, int threads, bool flag) {
    Barrier& barrier = barriers_[static_cast<std::size_t>(id)];
    const std::uint64_t phase = arrive(id, threads, flag);
    wait(
        &barrier, [&] { return barrier.phases >= phase; }, "barrier",
        static_cast<std::uint64_t>(id));
    return barrier.last_any;
  }

  // ---- mbarriers ----
  void mbarrier_init(std::uint64_t& barrier, int arrivals) {
    const auto count = static_cast<std::uint16_t>(arrivals);
    const MbarrierState state{count, count, 0, 0};
    std::memcpy(&barrier, &state, sizeof(state));
    mbarriers_.push_back(&barrier);
  }

  void mbarrier_add(std::uint64_t& barrier, int arrivals, std::int64_t bytes) {
    MbarrierState state = load(barrier);
    if (state.pending_arrivals < arrivals) fail("more arrivals at an mbarrier than it waits for");
    state.pending_arrivals = static_cast<std::uint16_t>(state.pending_arrivals - arrivals);
    state.pending_bytes = static_cast<std::int32_t>(state.pending_bytes + bytes);
    if (state.pending_arrivals == 0 && state.pending_bytes == 0) {
      state.pending_arrivals = state.arrivals;
      state.parity ^= 1;
      wake(&barrier);
    }
    std::memcpy(&barrier, &state, sizeof(state));
  }

  void mbarrier_wait(std::uint64_t& barrier, std::uint32_t parity) {
    wait(
        &barrier, [&] { return load(barrier).parity != parity; }, "mbarrier, byte",
        byte_of(barrier));
  }

  // ---- copies ----
  void queue_copy(const CopyStep& step) {
    if (step.to != nullptr) poison(step.to, static_cast<std::size_t>(step.bytes));
    own().copies.push_back(step);
  }
  void commit_copies() {
    ++own().copy_groups;
    queue_copy({.ends_group = true});
  }
  void wait_copies(int pending) {
    const Thread& thread = own();
    wait(&thread.copies, [&] { return thread.copy_groups <= pending; }, "cp.async");
  }
  void queue_bulk(BulkCopy copy) { bulk_copies_.push_back(std::move(copy)); }

  // ---- products ----
  void issue(const Product::Operands& operands, std::function<void(const Product&)> multiply) {
    Warpgroup& warpgroup = own_warpgroup();
    const std::uint64_t place = own().products++ - warpgroup.done;
    if (place >= warpgroup.queue.size()) warpgroup.queue.resize(place + 1);
    QueuedProduct& queued = warpgroup.queue[place];
    queued.product.threads[static_cast<std::size_t>(running_ % kWarpgroup)] = operands;
    ++queued.brought;
    if (running_ % kWarpgroup == 0) queued.multiply = std::move(multiply);
  }

  void commit() { own().product_groups.push_back(own().products); }

  void wait_products(int pending) {
    const auto& groups = own().product_groups;
    if (groups.size() <= static_cast<std::size_t>(pending)) return;
    const std::uint64_t until = groups[groups.size() - 1 - static_cast<std::size_t>(pending)];
    Warpgroup& warpgroup = own_warpgroup();
    wait(&warpgroup, [&] { return warpgroup.done >= until; }, "product", until);
    own().products_waited = until;
  }

 private:
  static constexpr std::uint64_t kTurnsPerChange = 64;

  static void enter() {
    Cta& cta = *current();
    cta.kernel_();
    cta.own().is_done = true;
    --cta.alive_;
    --cta.cluster_.alive;
    if (cta.own().cluster_phase > cta.cluster_.phases) --cta.cluster_.arrived;
    cta.cluster_.complete();
  }

  static std::uint64_t byte_of(const std::uint64_t& barrier) {
    return static_cast<std::uint64_t>(reinterpret_cast<const std::uint8_t*>(&barrier) -
                                      shared_memory());
  }

  static std::uint64_t random() { return random_engine()(); }

  Thread& own() { return threads_[static_cast<std::size_t>(running_)]; }
  Warpgroup& own_warpgroup() {
    return warpgroups_[static_cast<std::size_t>(running_ / kWarpgroup)];
  }

  void swap_out() { swapcontext(&own().context, &scheduler_); }

  void change_priority(std::size_t actor) {
    priorities_[actor] = random();
    std::sort(order_.begin(), order_.end(),
              [&](std::size_t a, std::size_t b) { return priorities_[a] > priorities_[b]; });
  }

  // One turn of the actor of the highest priority that has something to do.
  bool advance() {
    for (const std::size_t actor : order_) {
      if (actor < warps_.size()    ? run_warp(actor)
          : actor == warps_.size() ? run_copy()
                                   : run_product(warpgroups_[actor - warps_.size() - 1])) {
        return true;
      }
    }
    return false;
  }

  bool run_warp(std::size_t warp) {
    int ready[kWarp], count = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      const Thread& t = threads_[warp * kWarp + static_cast<std::size_t>(lane)];
      if (!t.is_done && t.waits_for == nullptr) ready[count++] = lane;
    }
    if (count == 0) return false;
    const int lane = ready[random() % static_cast<std::uint64_t>(count)];
    running_ = static_cast<int>(warp) * kWarp + lane;
    swapcontext(&scheduler_, &own().context);
    running_ = -1;
    return true;
  }

  bool run_copy() {
    std::vector<std::size_t> ready;
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      if (!threads_[i].copies.empty()) ready.push_back(i);
    }
    const std::size_t choices = ready.size() + bulk_copies_.size();
    if (choices == 0) return false;
    const std::size_t choice = random() % choices;
    if (choice < ready.size()) {
      std::deque<CopyStep>& steps = threads_[ready[choice]].copies;
      const CopyStep step = steps.front();
      steps.pop_front();
      const auto bytes = static_cast<std::size_t>(step.bytes);
      if (step.ends_group) {
        --threads_[ready[choice]].copy_groups;
        wake(&steps);
      } else if (step.barrier != nullptr) {
        mbarrier_add(*step.barrier, 1, 0);
      } else if (step.from != nullptr) {
        std::memcpy(step.to, step.from, bytes);
      } else {
        std::memset(step.to, 0, bytes);
      }
      return true;
    }
    std::swap(bulk_copies_[choice - ready.size()], bulk_copies_.back());
    const BulkCopy copy = std::move(bulk_copies_.back());
    bulk_copies_.pop_back();
    copy.copy();
    mbarrier_add(*copy.barrier, 0, -std::int64_t{copy.bytes});
    return true;
  }

  bool run_product(Warpgroup& warpgroup) {
    if (warpgroup.queue.empty() || warpgroup.queue.front().brought < kWarpgroup) return false;
    const QueuedProduct& next = warpgroup.queue.front();
    next.multiply(next.product);
    warpgroup.queue.pop_front();
    ++warpgroup.done;
    wake(&warpgroup);
    return true;
  }

  // What nobody has waited for: it would be done to another CTA's shared memory.
  std::string left_over() const {
    const auto copies = [](const Thread& t) { return !t.copies.empty(); };
    if (!bulk_copies_.empty() || std::any_of(threads_.begin(), threads_.end(), copies)) {
      return "ends before its copies";
    }
    const auto products = [](const Thread& t) { return t.products_waited != t.products; };
    if (std::any_of(threads_.begin(), threads_.end(), products)) return "ends before its products";
    for (const std::uint64_t* barrier : mbarriers_) {
      const MbarrierState state = load(*barrier);
      if (state.pending_arrivals != state.arrivals || state.pending_bytes != 0) {
        return "ends with arrivals at the mbarrier of byte " + std::to_string(byte_of(*barrier));
      }
    }
    for (std::size_t i = 0; i < barriers_.size(); ++i) {
      if (barriers_[i].arrived != 0) return "ends with arrivals at barrier " + std::to_string(i);
    }
    return "";
  }

  Cluster& cluster_;
  const Index3 grid_;
  const std::function<void()>& kernel_;
  Index3 index_;
  unsigned rank_ = 0;
  std::vector<std::uint8_t> image_;  // its shared memory, while another CTA has its turn
  ucontext_t scheduler_{};
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Warpgroup> warpgroups_;
  std::array<Barrier, kBarriers> barriers_;
  std::vector<const std::uint64_t*> mbarriers_;
  std::vector<BulkCopy> bulk_copies_;
  // Actors: the warps, the copy engine, the tensor cores.
  std::vector<std::uint64_t> priorities_;
  std::vector<std::size_t> order_;  // by priority
  int running_ = -1;
  int alive_ = 0;  // threads
  std::optional<std::string> error_;
};

Cta& cta() { return *Cta::current(); }

void Cluster::complete() {
  if (alive == 0 || arrived < alive) return;
  arrived = 0;
  ++phases;
  for (const auto& each : ctas) each->wake(this);
}

// All of the cluster's CTAs, in turns; the first's index is `first`.
std::string run_cluster(Cluster& cluster, Index3 first, int threads) {
  cluster.phases = 0;
  cluster.arrived = 0;
  cluster.alive = threads * static_cast<int>(cluster.ctas.size());
  for (unsigned rank = 0; rank < cluster.ctas.size(); ++rank) {
    cluster.ctas[rank]->begin({first.x, first.y + rank, 0}, rank);
  }
  while (true) {
    std::vector<Cta*> ready;
    std::string waiting;
    for (const auto& each : cluster.ctas) {
      if (each->can_go_on()) ready.push_back(each.get());
      if (!each->is_done()) waiting += each->who_waits();
    }
    if (ready.empty()) return waiting.empty() ? "" : "hangs: " + waiting;
    Cta& next = *ready[random_engine()() % ready.size()];
    next.go_on();
    if (next.error()) {
      return "rank " + std::to_string(next.rank()) + ": " + *next.error();
    }
  }
}

}  // namespace

void set_seed(std::uint64_t seed) { random_engine().seed(seed); }

namespace {
unsigned last_size = 0;
}
unsigned last_cluster() { return last_size; }

Status run_grid(Index3 grid, unsigned size, int threads, const std::function<void()>& kernel) {
  last_size = size;
  Cluster cluster;
  for (unsigned i = 0; i < size; ++i) {
    cluster.ctas.push_back(std::make_unique<Cta>(cluster, grid, threads, kernel));
  }
  std::string error;
  if (grid.z != 1) error = "a grid of three dimensions";
  if (grid.y % size != 0) error = "a grid of no whole clusters";
  for (unsigned y = 0; y < grid.y && error.empty(); y += size) {
    for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
      error = run_cluster(cluster, {x, y, 0}, threads);
      if (!error.empty())
        error = "CTA " + std::to_string(x) + ", " + std::to_string(y) + ": " + error;
    }
  }
  return error.empty() ? Status{} : Status::internal(error);
}

int thread_index() { return cta().thread(); }
int num_threads() { return cta().num_threads(); }
Index3 cta_index() { return cta().index(); }
Index3 grid_size() { return cta().grid(); }
unsigned cluster_rank() { return cta().rank(); }
std::uint8_t* of_cta(const void* shared, unsigned rank) { return cta().of_cta(shared, rank); }
void cluster_arrive() { cta().cluster_arrive(); }
void cluster_wait() { cta().cluster_wait(); }

void fail(const std::string& why) {
  cta().fail(why);
  std::abort();  // a thread that failed never comes back
}

const std::array<std::uint64_t, kWarp>& exchange(std::uint64_t value) {
  return cta().exchange(value);
}

void barrier_sync(int barrier, int threads) { cta().sync(barrier, threads, false); }
void barrier_arrive(int barrier, int threads) { cta().arrive(barrier, threads, false); }
bool barrier_any(int barrier, int threads, bool flag) { return cta().sync(barrier, threads, flag); }

void mbarrier_init(std::uint64_t& barrier, int arrivals) { cta().mbarrier_init(barrier, arrivals); }
void mbarrier_arrive(std::uint64_t& barrier, std::uint32_t count, std::uint32_t expected_bytes) {
  cta().mbarrier_add(barrier, static_cast<int>(count), expected_bytes);
}
void mbarrier_wait(std::uint64_t& barrier, std::uint32_t parity) {
  cta().mbarrier_wait(barrier, parity);
}

void copy_async(void* to, const void* from, int bytes) {
  cta().queue_copy({.to = to, .from = from, .bytes = bytes});
}
void zero_async(void* to, int bytes) { cta().queue_copy({.to = to, .bytes = bytes}); }
void arrive_after_copies(std::uint64_t& barrier) { cta().queue_copy({.barrier = &barrier}); }
void commit_copies() { cta().commit_copies(); }
void wait_copies(int pending) { cta().wait_copies(pending); }
void bulk_copy(std::uint64_t& barrier, std::uint32_t bytes, std::function<void()> copy) {
  cta().queue_bulk({&barrier, bytes, std::move(copy)});
}
void poison(void* to, std::size_t bytes) { std::memset(to, 0xFF, bytes); }

void wgmma_issue(const Product::Operands& own, std::function<void(const Product&)> multiply) {
  cta().issue(own, std::move(multiply));
}
void wgmma_commit() { cta().commit(); }
void wgmma_wait(int pending) { cta().wait_products(pending); }

}  // namespace dsa::emulator

// Where kernels declare their dynamic shared memory.
namespace dsa::cuda::sm90a {
alignas(1024) std::uint8_t shared_bytes[dsa::emulator::kSharedBytes];
}

namespace dsa::emulator {
std::uint8_t* shared_memory() { return cuda::sm90a::shared_bytes; }
}  // namespace dsa::emulator
