// The Python module. llmopt/backend/ calls it, and llmopt/quant/ for the choice of codes.
#include "module.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>

#include "multiplier.h"

namespace llmopt {
namespace {

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
  namespace nb = nanobind;
  using llmopt::Multiplier;
  using llmopt::PackedWeight;
  nb::set_leak_warnings(false);  // what a caller's module still holds when Python ends is no leak
  m.doc() = "Compiled products of activations and packed quantized weights, attention over a paged cache, sampling, "
            "and what calibration and the choice of codes need.";
  m.def("instruction_sets", &llmopt::instruction_sets, "Names of those that this processor has, fastest first.");

  nb::class_<PackedWeight>(m, "PackedWeight", "A quantized weight [out, in] in the layout of the kernels.")
      .def("__init__", &llmopt::pack, nb::arg("codes"), nb::arg("scales"), nb::arg("zeros").none(),
           nb::arg("bias").none(), nb::arg("order").none(), nb::arg("bits"), nb::arg("integer_activations"))
      .def_prop_ro("out_features", &PackedWeight::out)
      .def_prop_ro("in_features", &PackedWeight::in)
      .def_prop_ro("nbytes", &PackedWeight::bytes);

  llmopt::bind_paged_types(m);

  llmopt::bind_decoder(m);

  nb::class_<Multiplier> multiplier(m, "Multiplier",
                                    "Threads and an instruction set; the calling thread is one of the threads.");
  multiplier.def(nb::init<int, const std::string&>(), nb::arg("threads"), nb::arg("instruction_set") = "auto")
      .def_prop_ro("threads", &Multiplier::threads)
      .def_prop_ro("native_bfloat16",
                   [](const Multiplier& multiplier) { return multiplier.kernels().dense.native_bfloat16; })
      .def_prop_ro("instruction_set", &Multiplier::instruction_set)
      .def("multiply", &Multiplier::multiply, nb::arg("weight"), nb::arg("x"), nb::arg("x_stride"), nb::arg("rows"),
           nb::arg("y"), nb::arg("y_stride"), nb::call_guard<nb::gil_scoped_release>(),
           "y = x · weight + bias; x and y are addresses of float32 rows, strides count floats.")
      .def("peak_int8_ops", &Multiplier::peak_int8_ops, nb::call_guard<nb::gil_scoped_release>(),
           "Operations a second on 8-bit numbers in registers, all threads together.")
      .def("attend", &Multiplier::attend, nb::arg("queries"), nb::arg("out"), nb::arg("keys"), nb::arg("values"),
           nb::arg("tables"), nb::arg("contexts"), nb::arg("sequences"), nb::arg("table_width"), nb::arg("heads"),
           nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("block_size"), nb::arg("window"), nb::arg("scale"),
           nb::call_guard<nb::gil_scoped_release>(),
           "Attention of one query a sequence over a paged float32 cache; all tensors are contiguous, by address.")
      .def("rotate_and_store", &Multiplier::rotate_and_store, nb::arg("shape"), nb::arg("step"), nb::arg("qkv"),
           nb::arg("cache"), nb::call_guard<nb::gil_scoped_release>(),
           "Norms and rotates queries and keys, in place, and puts keys and values into a cache of 16 or 8 bits.")
      .def("attend_paged", &Multiplier::attend_paged, nb::arg("shape"), nb::arg("step"), nb::arg("qkv"), nb::arg("out"),
           nb::arg("cache"), nb::call_guard<nb::gil_scoped_release>(),
           "Causal attention of the queries in qkv over that cache.");
  llmopt::bind_rounded_products(multiplier);
  llmopt::bind_sampling(multiplier);
  llmopt::bind_calibration(multiplier);
}
