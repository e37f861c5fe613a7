// Which boxes of which matrices the bulk copies of each kind of GEMM move.
#pragma once

#include "sm90_fp8_mainloop.cuh"

namespace sonicmoe::sm90 {

// A row-major matrix, of which one copy moves ``box_rows`` rows of 128 bytes; its rows lie ``apart`` items from each other,
// if not side by side. False if it cannot be done.
bool describe(CUtensorMap* map, const void* data, Item item, int64_t rows, int64_t columns, uint32_t box_rows,
              int64_t apart = 0);

inline bool describe_weights(const Fp8Gemm& p, Maps& maps, uint32_t box_rows) {
  const int64_t rows = static_cast<int64_t>(p.n_experts - 1) * p.b_rows + p.width;
  return describe(&maps.b, p.b, Item::kByte, rows, p.depth, box_rows);
}

inline bool make_maps(RowsKind, const Fp8Gemm& p, Maps& maps) {
  return describe(&maps.a, p.a, Item::kByte, p.n_rows, p.depth, 64) && describe_weights(p, maps, RowsKind::kColumns) &&
         describe(&maps.d, p.d, p.half ? Item::kHalf : Item::kBfloat, p.n_rows, p.width, 64);
}

template <bool kClamp>
bool make_maps(UpKind<kClamp>, const Fp8Gemm& p, Maps& maps) {
  return describe_weights(p, maps, 64) && describe(&maps.d, p.d, Item::kByte, p.n_rows, p.width, 64) &&
         (p.e == nullptr || describe(&maps.e, p.e, Item::kByte, p.n_rows, p.width / 2, 64));
}

inline bool describe_down_backward(const Fp8Gemm& p, Maps& maps) {
  return describe_weights(p, maps, 64) && describe(&maps.z, p.z, Item::kByte, p.n_rows, 2 * p.width, 128) &&
         describe(&maps.d, p.d, Item::kByte, p.n_rows, 2 * p.width, 128);
}

template <bool kClamp>
bool make_maps(DownBackwardKind<kClamp>, const Fp8Gemm& p, Maps& maps) {
  return describe_down_backward(p, maps) && describe(&maps.dt, p.dt, Item::kByte, 2 * p.width, p.n_rows, 128) &&
         describe(&maps.e, p.e, Item::kByte, p.width, p.n_rows, 64);
}

template <bool kClamp>
bool make_maps(WideDownBackwardKind<kClamp>, const Fp8Gemm& p, Maps& maps) {
  const Item item = p.half ? Item::kHalf : Item::kBfloat;
  return describe_down_backward(p, maps) && describe(&maps.dt, p.dt, item, p.n_rows, 2 * p.width, 64) &&
         describe(&maps.e, p.e, item, p.n_rows, p.width, 64);
}

inline bool make_maps(WgradKind, const Fp8Gemm& p, Maps& maps) {
  const Item item = p.wide ? Item::kFloat : p.half ? Item::kHalf : Item::kBfloat;
  const int64_t rows = static_cast<int64_t>(p.n_experts - 1) * p.d_rows + p.height;
  return describe(&maps.a, p.a, Item::kByte, p.height, p.n_rows, 128) &&
         describe(&maps.b, p.b, Item::kByte, p.width, p.n_rows, 128) &&
         describe(&maps.d, p.d, item, rows, p.width, 64, p.d_columns);
}

}  // namespace sonicmoe::sm90
