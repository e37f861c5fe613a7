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

template <int kColumns>
bool make_maps(RowsKind<kColumns>, const Fp8Gemm& p, Maps& maps) {
  return describe(&maps.a, p.a, Item::kByte, p.n_rows, p.depth, 64) && describe_weights(p, maps, kColumns) &&
         describe(&maps.d, p.d, p.half ? Item::kHalf : Item::kBfloat, p.n_rows, p.width, 64, p.d_columns);
}

// A GEMM of rows in tiles of 192 columns, and in tiles of 128 behind them for as many columns as those leave: two or four
// such tiles make up for what two of 192 would waste. ``run`` is given a kind and a problem, and returns an error.
template <class Run>
const char* run_rows(const Fp8Gemm& p, Run run) {
  const int blocks = p.width / kTile, left = blocks == 1 ? 1 : (3 - blocks % 3) % 3 * 2;
  Fp8Gemm wide = p, narrow = p;
  wide.width = p.width - left * kTile;
  narrow.width = left * kTile;
  narrow.b = static_cast<const uint8_t*>(p.b) + static_cast<int64_t>(wide.width) * p.depth;
  narrow.b_scale = p.b_scale + static_cast<int64_t>(wide.width / kTile) * (p.depth / kTile);
  narrow.d = static_cast<uint16_t*>(p.d) + wide.width;
  const char* error = wide.width == 0 ? nullptr : run(RowsKind<192>(), wide);
  return error != nullptr || left == 0 ? error : run(RowsKind<kTile>(), narrow);
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
