// The Python face of the kernels. llmopt/backend/cpu.py is its only caller.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "multiply.h"

namespace nb = nanobind;

namespace llmopt {
namespace {

template <class Element, int kDimensions>
using Array = nb::ndarray<const Element, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;

// Those that this processor has, fastest first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> result;
  for (const Kernels* kernels : {avx512_vnni_kernels(), avx512_kernels(), avx2_kernels(), plain_kernels()}) {
    if (kernels && kernels->supported()) result.push_back(kernels);
  }
  return result;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& find_kernels(const std::string& name) {
  for (const Kernels* kernels : available()) {
    if (name == "auto" || name == kernels->name) return *kernels;
  }
  std::string known;
  for (const std::string& one : instruction_sets()) known += ", " + one;
  throw nb::value_error(("instruction set '" + name + "' is not here; this processor has: auto" + known).c_str());
}

void check(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

// The threads and the instruction set that work is done with.
class Multiplier {
 public:
  Multiplier(int threads, const std::string& instruction_set)
      : kernels_(find_kernels(instruction_set)), pool_(checked(threads)) {}

  int threads() const { return pool_.threads(); }
  std::string instruction_set() const { return kernels_.name; }

  // x and y are addresses of float32 rows: exchanging tensors costs more than a small product.
  void multiply(const PackedWeight& weight, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t y,
                int64_t y_stride) {
    if (rows == 0 || weight.out() == 0) return;
    llmopt::multiply(pool_, kernels_, weight,
                     {reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), rows, x_stride, y_stride});
  }

  // Addresses of float32 queries and out [sequences, heads, head_dim], keys and values [blocks, block_size, kv_heads,
  // head_dim], int32 tables [sequences, table_width] and contexts [sequences].
  void attend(uintptr_t queries, uintptr_t out, uintptr_t keys, uintptr_t values, uintptr_t tables, uintptr_t contexts,
              int64_t sequences, int64_t table_width, int64_t heads, int64_t kv_heads, int64_t head_dim,
              int64_t block_size, int64_t window, float scale) {
    check(head_dim % kTile == 0 && kv_heads > 0 && heads % kv_heads == 0,
          "the head size must be a multiple of 16, and key heads must divide heads");
    llmopt::attend(pool_, kernels_,
                   {reinterpret_cast<const float*>(queries), reinterpret_cast<float*>(out),
                    reinterpret_cast<const float*>(keys), reinterpret_cast<const float*>(values),
                    reinterpret_cast<const int32_t*>(tables), reinterpret_cast<const int32_t*>(contexts), sequences,
                    table_width, heads, kv_heads, head_dim, block_size, window, scale});
  }

 private:
  static int checked(int threads) {
    check(threads >= 1, "threads must be at least 1");
    return threads;
  }

  const Kernels& kernels_;
  ThreadPool pool_;
};

void check_order(const Array<int32_t, 1>& order, int64_t in) {
  for (size_t i = 0; i < order.shape(0); ++i) {
    check(order(i) >= -1 && order(i) < in, "order names an input that is not there");
  }
}

void pack(PackedWeight* self, Array<uint8_t, 2> codes, Array<float, 2> scales, std::optional<Array<uint8_t, 2>> zeros,
          std::optional<Array<float, 1>> bias, std::optional<Array<int32_t, 1>> order, int bits,
          bool integer_activations) {
  const auto out = static_cast<int64_t>(codes.shape(0)), in = static_cast<int64_t>(codes.shape(1));
  const auto groups = static_cast<int64_t>(scales.shape(1));
  const auto packed_in = order ? static_cast<int64_t>(order->shape(0)) : in;
  check(bits >= 2 && bits <= 8, "bits must be 2 to 8");
  check(static_cast<int64_t>(scales.shape(0)) == out && groups > 0, "scales must be [out, groups]");
  check(packed_in % groups == 0 && packed_in / groups % 8 == 0, "groups must be runs of a multiple of 8 inputs");
  check(!zeros || (zeros->shape(0) == scales.shape(0) && zeros->shape(1) == scales.shape(1)),
        "zeros must have the shape of scales");
  check(!bias || static_cast<int64_t>(bias->shape(0)) == out, "bias must be [out]");
  check(!integer_activations || (!zeros && groups == 1), "integer activations need one group a row and no zero points");
  if (order) check_order(*order, in);
  new (self) PackedWeight({codes.data(), scales.data(), zeros ? zeros->data() : nullptr, bias ? bias->data() : nullptr,
                           order ? order->data() : nullptr, out, in, packed_in, groups, bits, integer_activations});
}

}  // namespace
}  // namespace llmopt

NB_MODULE(_cpu, m) {
  using llmopt::Multiplier;
  using llmopt::PackedWeight;
  nb::set_leak_warnings(false);  // what a caller's module still holds when Python ends is no leak
  m.doc() = "Compiled products of activations and packed quantized weights, and attention over the paged cache.";
  m.def("instruction_sets", &llmopt::instruction_sets, "Names of those that this processor has, fastest first.");

  nb::class_<PackedWeight>(m, "PackedWeight", "A quantized weight [out, in] in the layout of the kernels.")
      .def("__init__", &llmopt::pack, nb::arg("codes"), nb::arg("scales"), nb::arg("zeros").none(),
           nb::arg("bias").none(), nb::arg("order").none(), nb::arg("bits"), nb::arg("integer_activations"))
      .def_prop_ro("out_features", &PackedWeight::out)
      .def_prop_ro("in_features", &PackedWeight::in)
      .def_prop_ro("nbytes", &PackedWeight::bytes);

  nb::class_<Multiplier>(m, "Multiplier", "Threads and an instruction set; the calling thread is one of the threads.")
      .def(nb::init<int, const std::string&>(), nb::arg("threads"), nb::arg("instruction_set") = "auto")
      .def_prop_ro("threads", &Multiplier::threads)
      .def_prop_ro("instruction_set", &Multiplier::instruction_set)
      .def("multiply", &Multiplier::multiply, nb::arg("weight"), nb::arg("x"), nb::arg("x_stride"), nb::arg("rows"),
           nb::arg("y"), nb::arg("y_stride"), nb::call_guard<nb::gil_scoped_release>(),
           "y = x · weight + bias; x and y are addresses of float32 rows, strides count floats.")
      .def("attend", &Multiplier::attend, nb::arg("queries"), nb::arg("out"), nb::arg("keys"), nb::arg("values"),
           nb::arg("tables"), nb::arg("contexts"), nb::arg("sequences"), nb::arg("table_width"), nb::arg("heads"),
           nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("block_size"), nb::arg("window"), nb::arg("scale"),
           nb::call_guard<nb::gil_scoped_release>(),
           "Attention of one query a sequence over a paged float32 cache; all tensors are contiguous, by address.");
}
