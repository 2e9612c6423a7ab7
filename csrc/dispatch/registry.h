// SPDX-License-Identifier: Apache-2.0
// Every kernel of this build, one closed list an op: what dispatch chooses from, what error
// messages and `python -m dsa_ext` print. Order within an op is preference.
#pragma once

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
};

// Specialised in registry.cpp for each Params of params.h.
template <typename Params>
std::span<const Kernel<Params>> kernels();

struct KernelInfo {
  std::string op;
  std::string id;
  DeviceType device;
  std::string takes;
};
std::vector<KernelInfo> list_kernels();

}  // namespace dsa
