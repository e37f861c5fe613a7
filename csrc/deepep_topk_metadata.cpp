// The host version of the routing metadata, and the Python bindings of both versions.
//
// Bindings take addresses, sizes and a stream handle, so one binary serves every framework.
#include "deepep_topk_metadata.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace sonicmoe {
namespace {

// Counts first, places second: the same two steps as the CUDA version, with one tile.
std::vector<int32_t> count_experts(const TopkProblem& p) {
  std::vector<int32_t> count(p.n_experts, 0);
  const int64_t slots = static_cast<int64_t>(p.n_tokens) * p.n_topk;
  for (int64_t s = 0; s < slots; ++s) {
    int32_t expert = expert_of(p, s);
    if (expert >= 0) ++count[expert];
  }
  return count;
}

// Returns the counts; writes only if they add up to what the caller allocated.
std::vector<int32_t> build_on_host(const TopkProblem& p, const ScaleRows& scales) {
  std::vector<int32_t> count = count_experts(p);
  int64_t total = 0, rows = 0;
  for (int32_t c : count) {
    total += c;
    rows += padded(c, p.block);
  }
  if (total != p.n_slots || rows != p.n_rows) return count;

  std::vector<int32_t> next(p.n_experts);
  int32_t row = 0;
  for (int32_t e = 0; e < p.n_experts; ++e) {
    p.expert_offset[e] = next[e] = row;
    row += padded(count[e], p.block);
  }
  p.expert_offset[p.n_experts] = row;

  int32_t slot = 0, compact = 0;
  for (int32_t token = 0; token < p.n_tokens; ++token) {
    p.slot_offset[token] = compact;
    for (int32_t k = 0; k < p.n_topk; ++k, ++slot) {
      int32_t expert = expert_of(p, slot);
      if (expert < 0) continue;
      const int32_t place = next[expert]++;
      p.score_src_idx[compact] = slot;
      p.scores[compact] = p.probs[slot];
      p.s_reverse_scatter_idx[compact] = place;
      p.x_gather_idx[place] = token;
      p.s_scatter_idx[place] = compact++;
    }
  }
  p.slot_offset[p.n_tokens] = compact;

  int32_t pad = 0;
  for (int32_t e = 0; e < p.n_experts; ++e) {
    for (int32_t r = next[e]; r < p.expert_offset[e + 1]; ++r) place_pad(p, pad++, r);
  }
  for (int64_t r = 0; r < p.n_rows && scales.words; ++r) {
    const uint32_t* from = scales.source + static_cast<int64_t>(p.x_gather_idx[r]) * scales.words;
    uint32_t* to = scales.sorted + r * scales.words;
    for (int32_t w = 0; w < scales.words; ++w) to[w] = from[w];
  }
  return count;
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (indices, wide, probs, T, K, E, block)
struct Inputs {
  TopkProblem problem{};
  Inputs(uintptr_t indices, bool wide, uintptr_t probs, int32_t tokens, int32_t topk, int32_t experts, int32_t block) {
    if (experts < 1 || experts > kMaxExperts) throw std::invalid_argument("E: need 1 to " + std::to_string(kMaxExperts));
    if (topk < 0 || topk > kMaxTopk) throw std::invalid_argument("K: need at most " + std::to_string(kMaxTopk));
    if (block < 1) throw std::invalid_argument("block: need at least 1");
    if (static_cast<int64_t>(tokens) * topk >= (int64_t{1} << 31)) throw std::invalid_argument("T*K: need under 2^31");
    problem.indices = pointer<const void>(indices);
    problem.probs = pointer<const float>(probs);
    problem.wide_indices = wide;
    problem.n_tokens = tokens;
    problem.n_topk = topk;
    problem.n_experts = experts;
    problem.block = block;
  }
};

struct Outputs {
  uintptr_t expert_offset, x_gather, s_scatter, s_reverse, slot_offset, scores, score_src;
  int32_t n_slots, n_rows;
  bool bounded;
  void into(TopkProblem& p) const {
    p.expert_offset = pointer<int32_t>(expert_offset);
    p.x_gather_idx = pointer<int32_t>(x_gather);
    p.s_scatter_idx = pointer<int32_t>(s_scatter);
    p.s_reverse_scatter_idx = pointer<int32_t>(s_reverse);
    p.slot_offset = pointer<int32_t>(slot_offset);
    p.scores = pointer<float>(scores);
    p.score_src_idx = pointer<int32_t>(score_src);
    p.n_slots = n_slots;
    p.n_rows = n_rows;
    p.bounded = bounded;
  }
};

ScaleRows scale_rows(uintptr_t source, uintptr_t sorted, int32_t words) {
  return {pointer<const uint32_t>(source), pointer<uint32_t>(sorted), words};
}

py::list as_list(const std::vector<int32_t>& values) {
  py::list list(values.size());
  for (size_t i = 0; i < values.size(); ++i) list[i] = values[i];
  return list;
}

}  // namespace
}  // namespace sonicmoe

PYBIND11_MODULE(SONICMOE_MODULE_NAME, m) {
  using namespace sonicmoe;
  m.doc() = "Routing metadata from top-k; see csrc/deepep_topk_metadata.h";

  py::class_<Inputs>(m, "Inputs")
      .def(py::init<uintptr_t, bool, uintptr_t, int32_t, int32_t, int32_t, int32_t>(), py::arg("indices"),
           py::arg("wide"), py::arg("probs"), py::arg("n_tokens"), py::arg("n_topk"), py::arg("n_experts"),
           py::arg("block"));
  py::class_<Outputs>(m, "Outputs")
      .def(py::init([](uintptr_t eo, uintptr_t xg, uintptr_t ss, uintptr_t sr, uintptr_t so, uintptr_t sc, uintptr_t si,
                       int32_t n_slots, int32_t n_rows, bool bounded) {
             return Outputs{eo, xg, ss, sr, so, sc, si, n_slots, n_rows, bounded};
           }),
           py::arg("expert_offset"), py::arg("x_gather"), py::arg("s_scatter"), py::arg("s_reverse"),
           py::arg("slot_offset"), py::arg("scores"), py::arg("score_src"), py::arg("n_slots"), py::arg("n_rows"),
           py::arg("bounded") = false);

  // (S, M) of host counts; a Python loop over many experts would cost as much as the launches.
  m.def("sizes", [](const py::list& counts, int32_t block) {
    int64_t slots = 0, rows = 0;
    for (py::handle item : counts) {
      const int64_t n = PyLong_AsLongLong(item.ptr());
      if (n == -1 && PyErr_Occurred()) throw py::error_already_set();
      slots += n;
      rows += (n + block - 1) / block * block;
    }
    return py::make_tuple(slots, rows);
  });
  m.def("count", [](const Inputs& in) {
    std::vector<int32_t> count;
    {
      py::gil_scoped_release release;
      count = count_experts(in.problem);
    }
    return as_list(count);
  });
  m.def("build", [](const Inputs& in, const Outputs& out, uintptr_t source, uintptr_t sorted, int32_t words) {
    TopkProblem p = in.problem;
    out.into(p);
    std::vector<int32_t> count;
    {
      py::gil_scoped_release release;
      count = build_on_host(p, scale_rows(source, sorted, words));
    }
    return as_list(count);
  });
  m.def("check", [](const Inputs& in) -> int64_t {
    for (int32_t token = 0; token < in.problem.n_tokens; ++token) {
      RowFault fault = check_row(in.problem, token);
      if (fault != kRowGood) return int64_t{token} * 4 + fault;
    }
    return -1;
  });

#if defined(SONICMOE_WITH_CUDA)
  m.def("workspace_words", &workspace_words);
  m.def("launch", [](const Inputs& in, const Outputs& out, uintptr_t source, uintptr_t sorted, int32_t words,
                     uintptr_t workspace, uintptr_t stream) {
    TopkProblem p = in.problem;
    out.into(p);
    const char* error = launch(p, scale_rows(source, sorted, words), pointer<int32_t>(workspace), pointer<void>(stream));
    if (*error) throw std::runtime_error(std::string("deepep_topk_metadata: ") + error);
  });
  m.def("launch_check", [](const Inputs& in, uintptr_t verdict, uintptr_t stream) {
    const char* error = launch_check(in.problem, pointer<int64_t>(verdict), pointer<void>(stream));
    if (*error) throw std::runtime_error(std::string("deepep_topk_metadata: ") + error);
  });
#endif
}
