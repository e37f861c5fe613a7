// Python bindings of the grouped FP8 GEMMs: addresses, sizes and a stream handle, so one binary serves every framework.
#include "sm90_fp8_gemm.h"

#include <pybind11/pybind11.h>

#include <limits>
#include <stdexcept>

namespace py = pybind11;

namespace sonicmoe {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(const char* fault) {
  if (fault != nullptr) throw std::runtime_error(fault);
}

// What all problems over sorted rows have in common.
Fp8Gemm rows_problem(uintptr_t a, uintptr_t a_scale, uintptr_t b, uintptr_t b_scale, uintptr_t offset, int32_t n_rows,
                     int32_t n_experts, int32_t width, int32_t depth, int32_t blocks) {
  Fp8Gemm p{};
  p.a = at<void>(a);
  p.a_scale = at<float>(a_scale);
  p.b = at<void>(b);
  p.b_scale = at<float>(b_scale);
  p.offset = at<int32_t>(offset);
  p.n_rows = n_rows;
  p.n_experts = n_experts;
  p.width = p.b_rows = width;
  p.depth = depth;
  p.blocks = blocks;
  p.clamp = std::numeric_limits<float>::infinity();
  return p;
}

// How tokens become sorted rows.
struct Tokens {
  uintptr_t gather, scatter, score;
  int32_t n_slots;
  void into(Fp8Gemm& p) const {
    p.gather = at<int32_t>(gather);
    p.scatter = at<int32_t>(scatter);
    p.score = at<float>(score);
    p.n_slots = n_slots;
  }
};

}  // namespace
}  // namespace sonicmoe

PYBIND11_MODULE(SONICMOE_MODULE_NAME, m) {
  using namespace sonicmoe;
  m.doc() = "Grouped FP8 GEMMs for Hopper; see csrc/sm90_fp8_gemm.h";

  py::class_<Fp8Gemm>(m, "Problem")
      .def(py::init(&rows_problem), py::arg("a"), py::arg("a_scale"), py::arg("b"), py::arg("b_scale"),
           py::arg("offset"), py::arg("n_rows"), py::arg("n_experts"), py::arg("width"), py::arg("depth"),
           py::arg("blocks"));
  py::class_<Tokens>(m, "Tokens")
      .def(py::init([](uintptr_t gather, uintptr_t scatter, uintptr_t score, int32_t n_slots) {
             return Tokens{gather, scatter, score, n_slots};
           }),
           py::arg("gather"), py::arg("scatter"), py::arg("score"), py::arg("n_slots"));

  m.def(
      "rows",
      [](Fp8Gemm p, int32_t b_rows, uintptr_t y, bool half, uintptr_t stream) {
        p.b_rows = b_rows;
        p.d = at<void>(y);
        p.half = half;
        require(fp8_rows(p, at<void>(stream)));
      },
      py::arg("problem"), py::arg("b_rows"), py::arg("y"), py::arg("half"), py::arg("stream"));
  m.def(
      "up",
      [](Fp8Gemm p, const Tokens& tokens, uintptr_t z, uintptr_t z_scale, uintptr_t a, uintptr_t a_scale, float clamp,
         bool pow2, uintptr_t stream) {
        tokens.into(p);
        p.d = at<void>(z);
        p.d_scale = at<float>(z_scale);
        p.e = at<void>(a);
        p.e_scale = at<float>(a_scale);
        p.clamp = clamp;
        p.pow2 = pow2;
        require(fp8_up(p, at<void>(stream)));
      },
      py::arg("problem"), py::arg("tokens"), py::arg("z"), py::arg("z_scale"), py::arg("a"), py::arg("a_scale"),
      py::arg("clamp"), py::arg("pow2"), py::arg("stream"));
  m.def(
      "down_backward",
      [](Fp8Gemm p, const Tokens& tokens, uintptr_t z, uintptr_t z_scale, uintptr_t dz, uintptr_t dz_scale,
         uintptr_t dz_t, uintptr_t dz_t_scale, uintptr_t pa_t, uintptr_t pa_t_scale, uintptr_t parts, float clamp,
         bool pow2, bool half, uintptr_t stream) {
        tokens.into(p);
        p.z = at<void>(z);
        p.z_scale = at<float>(z_scale);
        p.d = at<void>(dz);
        p.d_scale = at<float>(dz_scale);
        p.dt = at<void>(dz_t);
        p.dt_scale = at<float>(dz_t_scale);
        p.e = at<void>(pa_t);
        p.e_scale = at<float>(pa_t_scale);
        p.parts = at<float>(parts);
        p.clamp = clamp;
        p.pow2 = pow2;
        p.half = half;
        require(fp8_down_backward(p, at<void>(stream)));
      },
      py::arg("problem"), py::arg("tokens"), py::arg("z"), py::arg("z_scale"), py::arg("dz"), py::arg("dz_scale"),
      py::arg("dz_t"), py::arg("dz_t_scale"), py::arg("pa_t"), py::arg("pa_t_scale"), py::arg("parts"),
      py::arg("clamp"), py::arg("pow2"), py::arg("half"), py::arg("stream"));
  m.def(
      "tokens",
      [](uintptr_t rows, uintptr_t row_scale, const std::string& kind, int32_t apart, const Tokens& tokens, int32_t n_rows,
         uintptr_t data, uintptr_t scale, int32_t width, bool pow2, uintptr_t stream) {
        const Fp8Tokens p{at<void>(rows), at<float>(row_scale), at<int32_t>(tokens.gather), at<int32_t>(tokens.scatter),
                          at<uint8_t>(data), at<float>(scale), n_rows / 128, tokens.n_slots, width, apart, pow2};
        require(fp8_tokens(p, kind, at<void>(stream)));
      },
      py::arg("rows"), py::arg("row_scale"), py::arg("kind"), py::arg("apart"), py::arg("tokens"), py::arg("n_rows"),
      py::arg("data"), py::arg("scale"), py::arg("width"), py::arg("pow2"), py::arg("stream"));
  m.def(
      "wgrad",
      [](Fp8Gemm p, int32_t height, int32_t d_rows, int32_t d_columns, uintptr_t d, bool wide, bool half, bool add,
         uintptr_t stream) {
        p.height = height;
        p.d_rows = d_rows;
        p.d_columns = d_columns;
        p.d = at<void>(d);
        p.wide = wide;
        p.half = half;
        p.add = add;
        require(fp8_wgrad(p, at<void>(stream)));
      },
      py::arg("problem"), py::arg("height"), py::arg("d_rows"), py::arg("d_columns"), py::arg("d"), py::arg("wide"),
      py::arg("half"), py::arg("add"), py::arg("stream"));
}
