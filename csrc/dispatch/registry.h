// SPDX-License-Identifier: Apache-2.0
// Every kernel of this build, one closed list an op: what dispatch chooses from, what error
// messages and `python -m dsa_ext` print. Order within an op is preference.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa {

// Can this kernel take these (validated) arguments? An empty reason is yes.
struct Support {
  std::string reason;
  bool ok() const { return reason.empty(); }
};

template <typename Params>
struct Kernel {
  const char* id;     // kernel = file = profiler name
  DeviceType device;  // where its tensors live
  const char* takes;  // for the report: shapes and formats, in words
  Support (*supports)(const Params&);
  Status (*run)(const Params&);
  // What params.workspace must hold, at most kMaxWorkspaceBytes; only for ops that have one.
  std::int64_t (*workspace_bytes)(const Params&) = nullptr;
  // Passed over unless forced, where another kernel is known to win (heuristics.h).
  bool (*loses)(const Params&) = nullptr;
};

// Specialised in registry.cpp for each Params of params.h.
template <typename Params>
std::span<const Kernel<Params>> kernels();

// The latent dimensions that attention kernels without shapes of their own take.
Support mla_dims(std::int64_t d_qk, std::int64_t d_v);

struct KernelInfo {
  std::string op;
  std::string id;
  DeviceType device;
  std::string takes;
};
std::vector<KernelInfo> list_kernels();

}  // namespace dsa
