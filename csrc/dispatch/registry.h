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

// Can this kernel take these (validated) arguments, or run on this device? An empty reason is yes.
struct Support {
  std::string reason;
  bool ok() const { return reason.empty(); }
};

// Where a kernel's tensors live, and which of those devices run it, whatever the arguments. The
// one place that asks for a GPU's architecture.
struct Target {
  DeviceType type;
  Support (*supports)(const Device&);  // a device of that type
};
Support runs_on(const Target& target, Device device);

template <typename Params>
struct Kernel {
  const char* id;  // <backend>_<op>[_<variant>]
  Target target;
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
  Target target;
  std::string takes;
};
std::vector<KernelInfo> list_kernels();

}  // namespace dsa
