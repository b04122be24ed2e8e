// specfuse._C_cpu.CorpusIndex. Values are checked here; every call that takes time lets other threads run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "corpus_index.h"

namespace py = pybind11;

void bind_corpus_index(py::module_& module);

namespace {

using specfuse::CorpusContent;
using specfuse::CorpusIndex;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Tokens = Array<int32_t>;

void check_tokens(const char* name, const Tokens& tokens) {
  if (tokens.ndim() != 1) {
    throw std::invalid_argument(std::string(name) + " must be one-dimensional, got " +
                                std::to_string(tokens.ndim()) + " dimensions");
  }
  for (py::ssize_t i = 0; i < tokens.shape(0); ++i) {
    if (tokens.data()[i] < 0) {
      throw std::invalid_argument(std::string(name) + " must not be negative, got " +
                                  std::to_string(tokens.data()[i]) + " at index " + std::to_string(i));
    }
  }
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <typename T>
std::vector<T> to_vector(const Array<T>& values) {
  return std::vector<T>(values.data(), values.data() + values.size());
}

void observe(CorpusIndex& index, const Tokens& tokens, uint64_t scope, uint64_t evidence) {
  check_tokens("tokens", tokens);
  py::gil_scoped_release release;
  index.observe(tokens.data(), static_cast<size_t>(tokens.size()), scope, evidence);
}

py::tuple propose(const CorpusIndex& index, const Tokens& answer, int64_t skipped, uint64_t scope,
                  uint64_t evidence, int max_nodes, int max_depth) {
  check_tokens("answer", answer);
  if (skipped < 0)
    throw std::invalid_argument("skipped must not be negative, got " + std::to_string(skipped));
  specfuse::DraftedTree tree;
  {
    py::gil_scoped_release release;
    const specfuse::AnswerWindow window{answer.data(), static_cast<int>(answer.size()), skipped, scope,
                                        evidence};
    index.propose(window, max_nodes, max_depth, &tree);
  }
  return py::make_tuple(to_array(tree.tokens), to_array(tree.parents), to_array(tree.probs));
}

py::tuple export_content(const CorpusIndex& index) {
  CorpusContent content;
  {
    py::gil_scoped_release release;
    content = index.export_content();
  }
  return py::make_tuple(to_array(content.tokens), to_array(content.lengths), to_array(content.scopes),
                        to_array(content.evidence), to_array(content.gates));
}

void import_content(CorpusIndex& index, const Tokens& tokens, const Array<int64_t>& lengths,
                    const Array<uint64_t>& scopes, const Array<uint64_t>& evidence,
                    const Array<float>& gates) {
  check_tokens("tokens", tokens);
  const CorpusContent content{to_vector(tokens), to_vector(lengths), to_vector(scopes), to_vector(evidence),
                              to_vector(gates)};
  bool fits;
  {
    py::gil_scoped_release release;
    fits = index.import_content(content);
  }
  if (!fits) {
    throw std::invalid_argument("the arrays do not fit together: " + std::to_string(tokens.size()) +
                                " tokens, " + std::to_string(lengths.size()) + " lengths, " +
                                std::to_string(scopes.size()) + " scopes, " + std::to_string(gates.size()) +
                                " gates");
  }
}

}  // namespace

void bind_corpus_index(py::module_& module) {
  py::class_<CorpusIndex>(module, "CorpusIndex")
      .def(py::init<size_t, uint32_t>(), py::arg("max_tokens"), py::arg("first_position") = 1)
      .def("observe", &observe, py::arg("tokens"), py::arg("scope") = 0, py::arg("evidence") = 0)
      .def("propose", &propose, py::arg("answer"), py::arg("skipped") = 0, py::arg("scope") = 0,
           py::arg("evidence") = 0, py::arg("max_nodes") = 16, py::arg("max_depth") = 1 << 20)
      .def("export_content", &export_content)
      .def("import_content", &import_content, py::arg("tokens"), py::arg("lengths"), py::arg("scopes"),
           py::arg("evidence"), py::arg("gates"))
      .def("clear", &CorpusIndex::clear, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_answers", &CorpusIndex::num_answers)
      .def_property_readonly("num_tokens", &CorpusIndex::num_tokens)
      .def_property_readonly("max_tokens", &CorpusIndex::max_tokens)
      .def_property_readonly("nbytes", &CorpusIndex::bytes);
}
