// Python bindings of the grouped FP8 GEMMs: addresses, sizes and a stream handle, so one binary serves every framework.
#include "sm90_fp8_gemm.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

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

// The GEMMs of one call: what all of them have in common, stated once. Each takes the rest, operands with their scales.
struct Gemms {
  Fp8Gemm common;

  Gemms(uintptr_t offset, uintptr_t gather, uintptr_t scatter, uintptr_t score, int32_t n_rows, int32_t n_slots,
        int32_t n_experts, int32_t blocks, float clamp, bool pow2, bool half)
      : common{} {
    common.offset = at<int32_t>(offset);
    common.gather = at<int32_t>(gather);
    common.scatter = at<int32_t>(scatter);
    common.score = at<float>(score);
    common.n_rows = n_rows;
    common.n_slots = n_slots;
    common.n_experts = n_experts;
    common.blocks = blocks;
    common.clamp = clamp;
    common.pow2 = pow2;
    common.half = half;
  }

  Fp8Gemm problem(uintptr_t a, uintptr_t a_scale, uintptr_t b, uintptr_t b_scale, int32_t width, int32_t depth) const {
    Fp8Gemm p = common;
    p.a = at<void>(a);
    p.a_scale = at<float>(a_scale);
    p.b = at<void>(b);
    p.b_scale = at<float>(b_scale);
    p.width = p.b_rows = width;
    p.depth = depth;
    return p;
  }

  // ``width`` of each expert's ``b_rows`` rows of b, from ``first`` on.
  void rows(uintptr_t a, uintptr_t a_scale, uintptr_t b, uintptr_t b_scale, int32_t width, int32_t depth,
            int32_t first, int32_t b_rows, uintptr_t y, uintptr_t stream) const {
    const int64_t before = static_cast<int64_t>(first) * depth;
    Fp8Gemm p = problem(a, a_scale, b + before, b_scale + before / (128 * 128) * sizeof(float), width, depth);
    p.b_rows = b_rows;
    p.d = at<void>(y);
    p.d_columns = width;
    require(fp8_rows(p, at<void>(stream)));
  }

  void up(uintptr_t x, uintptr_t x_scale, uintptr_t w, uintptr_t w_scale, int32_t width, int32_t depth, uintptr_t z,
          uintptr_t z_scale, uintptr_t a, uintptr_t a_scale, uintptr_t stream) const {
    Fp8Gemm p = problem(x, x_scale, w, w_scale, width, depth);
    p.d = at<void>(z);
    p.d_scale = at<float>(z_scale);
    p.e = at<void>(a);
    p.e_scale = at<float>(a_scale);
    require(fp8_up(p, at<void>(stream)));
  }

  void down_backward(uintptr_t dout, uintptr_t dout_scale, uintptr_t w, uintptr_t w_scale, int32_t width, int32_t depth,
                     uintptr_t z, uintptr_t z_scale, uintptr_t dz, uintptr_t dz_scale, uintptr_t dz_t,
                     uintptr_t dz_t_scale, uintptr_t pa_t, uintptr_t pa_t_scale, uintptr_t parts,
                     uintptr_t stream) const {
    Fp8Gemm p = problem(dout, dout_scale, w, w_scale, width, depth);
    p.z = at<void>(z);
    p.z_scale = at<float>(z_scale);
    p.d = at<void>(dz);
    p.d_scale = at<float>(dz_scale);
    p.dt = at<void>(dz_t);
    p.dt_scale = at<float>(dz_t_scale);
    p.e = at<void>(pa_t);
    p.e_scale = at<float>(pa_t_scale);
    p.parts = at<float>(parts);
    require(fp8_down_backward(p, at<void>(stream)));
  }

  void tokens(uintptr_t rows, uintptr_t row_scale, const std::string& kind, int32_t apart, uintptr_t data,
              uintptr_t scale, int32_t width, uintptr_t stream) const {
    const Fp8Tokens p{at<void>(rows),      at<float>(row_scale), common.gather,  common.scatter,
                      at<uint8_t>(data),   at<float>(scale),     common.n_rows / 128, common.n_slots,
                      width,               apart,                common.pow2};
    require(fp8_tokens(p, kind, at<void>(stream)));
  }

  // Into an array of ``kind``, "bfloat16", "float16" or "float32".
  void wgrad(uintptr_t left, uintptr_t left_scale, uintptr_t right, uintptr_t right_scale, int32_t height,
             int32_t width, uintptr_t d, int32_t d_rows, int32_t d_columns, const std::string& kind, bool add,
             uintptr_t stream) const {
    Fp8Gemm p = problem(left, left_scale, right, right_scale, width, 0);
    p.height = height;
    p.d = at<void>(d);
    p.d_rows = d_rows;
    p.d_columns = d_columns;
    p.wide = kind == "float32";
    p.half = kind == "float16";
    p.add = add;
    require(p.wide || p.half || kind == "bfloat16" ? nullptr : "a weight gradient of another kind");
    require(fp8_wgrad(p, at<void>(stream)));
  }
};

}  // namespace
}  // namespace sonicmoe

PYBIND11_MODULE(SONICMOE_MODULE_NAME, m) {
  using namespace sonicmoe;
  m.doc() = "Grouped FP8 GEMMs for Hopper; see csrc/sm90_fp8_gemm.h";

  py::class_<Gemms>(m, "Gemms")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int32_t, int32_t, int32_t, int32_t, float, bool, bool>(),
           py::arg("offset"), py::arg("gather"), py::arg("scatter"), py::arg("score"), py::arg("n_rows"),
           py::arg("n_slots"), py::arg("n_experts"), py::arg("blocks"), py::arg("clamp"), py::arg("pow2"),
           py::arg("half"))
      .def("rows", &Gemms::rows, py::arg("a"), py::arg("a_scale"), py::arg("b"), py::arg("b_scale"), py::arg("width"),
           py::arg("depth"), py::arg("first"), py::arg("b_rows"), py::arg("y"), py::arg("stream"))
      .def("up", &Gemms::up, py::arg("x"), py::arg("x_scale"), py::arg("w"), py::arg("w_scale"), py::arg("width"),
           py::arg("depth"), py::arg("z"), py::arg("z_scale"), py::arg("a"), py::arg("a_scale"), py::arg("stream"))
      .def("down_backward", &Gemms::down_backward, py::arg("dout"), py::arg("dout_scale"), py::arg("w"),
           py::arg("w_scale"), py::arg("width"), py::arg("depth"), py::arg("z"), py::arg("z_scale"), py::arg("dz"),
           py::arg("dz_scale"), py::arg("dz_t"), py::arg("dz_t_scale"), py::arg("pa_t"), py::arg("pa_t_scale"),
           py::arg("parts"), py::arg("stream"))
      .def("tokens", &Gemms::tokens, py::arg("rows"), py::arg("row_scale"), py::arg("kind"), py::arg("apart"),
           py::arg("data"), py::arg("scale"), py::arg("width"), py::arg("stream"))
      .def("wgrad", &Gemms::wgrad, py::arg("left"), py::arg("left_scale"), py::arg("right"), py::arg("right_scale"),
           py::arg("height"), py::arg("width"), py::arg("d"), py::arg("d_rows"), py::arg("d_columns"), py::arg("kind"),
           py::arg("add"), py::arg("stream"));
}
