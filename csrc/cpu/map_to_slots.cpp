// SPDX-License-Identifier: Apache-2.0
#include "core/page_table.h"
#include "cpu/cpu_kernels.h"
#include "cpu/tensor_rows.h"
#include "dsa/parallel.h"

namespace dsa::cpu {

Status map_to_slots(const MapToSlotsParams& params) {
  const TensorRows indices(params.indices);
  const TensorRows out(params.out);
  const PageTable table{params.block_table, params.page_size};
  const RequestOfRow request_of_row{params.row_to_request, indices.count(),
                                    params.block_table.size(0)};
  parallel_for(0, indices.count(), row_grain(indices.width()),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) {
                   const PageTableRow pages = table.row(request_of_row(row));
                   const std::int32_t* tokens = indices.row<const std::int32_t>(row);
                   std::int32_t* slots = out.row<std::int32_t>(row);
                   for (std::int64_t i = 0; i < indices.width(); ++i) {
                     slots[i] = narrow_or_invalid(pages.slot(tokens[i]));
                   }
                 }
               });
  return {};
}

}  // namespace dsa::cpu
