// The Python face of linear.h and decoder.h. Tensors that stay where they are cross as addresses; the caller keeps them
// alive.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "decoder.h"
#include "module.h"
#include "multiplier.h"

namespace llmopt {
namespace {

using Floats2 = Array<float, 2>;
// int8: small integers; uint8: e4m3 numbers
using Bytes2 = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Scales or minimums: floats [out, groups], or with bytes [out, groups] their factors [out, runs].
NumbersInput numbers_of(const std::optional<Floats2>& floats, const std::optional<Bytes2>& bytes, int64_t out,
                        int64_t groups, const char* what) {
  if (!floats) return {};
  const auto columns = static_cast<int64_t>(floats->shape(1));
  check(static_cast<int64_t>(floats->shape(0)) == out && columns > 0 && groups % columns == 0, what);
  if (!bytes) {
    check(columns == groups, what);
    return {floats->data(), nullptr, nullptr, nullptr, 0};
  }
  check(static_cast<int64_t>(bytes->shape(0)) == out && static_cast<int64_t>(bytes->shape(1)) == groups, what);
  const bool fp8 = bytes->dtype() == nb::dtype<uint8_t>();
  check(fp8 || bytes->dtype() == nb::dtype<int8_t>(), "bytes must be int8, or uint8 for e4m3 numbers");
  return {nullptr, fp8 ? nullptr : static_cast<const int8_t*>(bytes->data()),
          fp8 ? static_cast<const uint8_t*>(bytes->data()) : nullptr, floats->data(), columns};
}

void pack_integers(IntegerWeight* self, Multiplier& multiplier, Array<uint8_t, 2> codes, int64_t groups, Floats2 scales,
                   std::optional<Bytes2> scale_bytes, std::optional<Array<uint8_t, 2>> zeros,
                   std::optional<Floats2> minimums, std::optional<Bytes2> minimum_bytes,
                   std::optional<Array<float, 1>> bias, std::optional<Array<int32_t, 1>> order, int bits, bool fp4,
                   bool whole_rows, int64_t longest_step) {
  const auto out = static_cast<int64_t>(codes.shape(0)), in = static_cast<int64_t>(codes.shape(1));
  const auto packed_in = order ? static_cast<int64_t>(order->shape(0)) : in;
  check(bits >= 2 && bits <= 8, "bits must be 2 to 8");
  check(groups > 0 && packed_in % groups == 0 && packed_in / groups % 8 == 0,
        "groups must be runs of a multiple of 8 inputs");
  check(!zeros || (static_cast<int64_t>(zeros->shape(0)) == out && static_cast<int64_t>(zeros->shape(1)) == groups),
        "zeros must be [out, groups]");
  check(!(zeros && minimums), "a weight has zeros or minimums");
  check(!bias || static_cast<int64_t>(bias->shape(0)) == out, "bias must be [out]");
  check(!fp4 || (bits == 4 && !zeros && !minimums), "FP4 has 4 bits, no zeros and no minimums");
  check(!whole_rows || groups == 1, "one scale for each row of activations needs one group a row");
  check(longest_step >= 16, "a step of activations has at least 16 inputs");
  if (order) check_order(*order, in);
  new (self) IntegerWeight(
      multiplier.pool(),
      {codes.data(),
       numbers_of(scales, scale_bytes, out, groups, "scales must be [out, groups], or [out, runs] with bytes"),
       numbers_of(minimums, minimum_bytes, out, groups, "minimums must be [out, groups], or [out, runs] with bytes"),
       zeros ? zeros->data() : nullptr, bias ? bias->data() : nullptr, order ? order->data() : nullptr, out, in,
       packed_in, groups, bits, fp4, whole_rows, longest_step});
}

void pack_dense(DenseWeight* self, Array<uint16_t, 2> values, bool bfloat16, std::optional<Array<float, 1>> bias) {
  const auto out = static_cast<int64_t>(values.shape(0)), in = static_cast<int64_t>(values.shape(1));
  check(!bias || static_cast<int64_t>(bias->shape(0)) == out, "bias must be [out]");
  check(!bfloat16 || in % 2 == 0, "bfloat16 weights need an even number of inputs");
  new (self) DenseWeight(values.data(), bfloat16, bias ? bias->data() : nullptr, out, in);
}

void pack_fp8(DenseWeight* self, Array<uint8_t, 2> codes, Array<float, 1> scales, bool rows_in_fp8,
              std::optional<Array<float, 1>> bias) {
  const auto out = static_cast<int64_t>(codes.shape(0)), in = static_cast<int64_t>(codes.shape(1));
  check(static_cast<int64_t>(scales.shape(0)) == out, "scales must be [out]");
  check(!bias || static_cast<int64_t>(bias->shape(0)) == out, "bias must be [out]");
  check(in % 2 == 0, "FP8 weights need an even number of inputs");
  check(std::none_of(codes.data(), codes.data() + out * in, [](uint8_t code) { return (code & 0x7F) == 0x7F; }),
        "FP8 weights must be finite");
  new (self) DenseWeight({codes.data(), scales.data(), rows_in_fp8}, bias ? bias->data() : nullptr, out, in);
}

Part part_of(nb::handle weight) {
  if (nb::isinstance<IntegerWeight>(weight)) return {nb::cast<const IntegerWeight*>(weight), nullptr};
  if (nb::isinstance<DenseWeight>(weight)) return {nullptr, nb::cast<const DenseWeight*>(weight)};
  throw nb::type_error("a weight is an IntegerWeight or a DenseWeight");
}

std::vector<Part> parts_of(const nb::list& weights, int64_t in) {
  std::vector<Part> parts;
  for (nb::handle weight : weights) parts.push_back(part_of(weight));
  check(!parts.empty(), "a linear operation needs a weight");
  for (const Part& part : parts) check(part.in() == in, "weights that lie side by side need inputs of one width");
  return parts;
}

CacheKind cache_kind(const std::string& name) {
  if (name == "bfloat16") return CacheKind::kBFloat16;
  if (name == "int8") return CacheKind::kInt8;
  if (name == "fp8") return CacheKind::kFp8;
  throw nb::value_error(("unknown cache '" + name + "'; known: bfloat16, int8, fp8").c_str());
}

EmbeddingTable::Kind embedding_kind(const std::string& name) {
  if (name == "float32") return EmbeddingTable::Kind::kFloat32;
  if (name == "bfloat16") return EmbeddingTable::Kind::kBFloat16;
  if (name == "float16") return EmbeddingTable::Kind::kFloat16;
  throw nb::value_error(("unknown embedding '" + name + "'; known: float32, bfloat16, float16").c_str());
}

// All tensors are addresses; whoever calls keeps them alive.
void make_decoder(Decoder* self, Multiplier& multiplier, int64_t heads, int64_t kv_heads, int64_t head_dim,
                  int64_t rotated, int64_t block_size, float eps, const std::string& cache, uintptr_t embedding,
                  const std::string& embedding_dtype, int64_t hidden, uintptr_t norm, const nb::list& head,
                  uintptr_t frequencies) {
  check(kv_heads > 0 && heads % kv_heads == 0, "key heads must divide heads");
  check(head_dim % kTile == 0 && block_size % kTile == 0, "head and block sizes must be multiples of 16");
  check(rotated % 2 == 0 && rotated <= head_dim, "rotated channels are an even number within the head");
  new (self) Decoder(multiplier.pool(), multiplier.kernels(),
                     {hidden, heads, kv_heads, head_dim, rotated, block_size, eps, cache_kind(cache)},
                     {embedding_kind(embedding_dtype), address<void>(embedding)}, address<float>(norm),
                     Linear(parts_of(head, hidden)), address<float>(frequencies));
}

void add_layer(Decoder& self, const nb::list& qkv, const nb::list& output, const nb::list& gate_up,
               const nb::list& down, uintptr_t input_norm, uintptr_t mlp_norm, uintptr_t query_norm, uintptr_t key_norm,
               int64_t window, const LayerCache& cache) {
  const int64_t hidden = self.shape().hidden, width = self.shape().heads * self.shape().head_dim;
  const std::vector<Part> gated = parts_of(gate_up, hidden);
  check(gated.size() == 2 && gated[0].out() == gated[1].out(), "gate and up are two weights of one shape");
  DecoderLayer layer{Linear(parts_of(qkv, hidden)),
                     Linear(parts_of(output, width)),
                     GatedLinear(gated[0], gated[1]),
                     Linear(parts_of(down, gated[0].out())),
                     address<float>(input_norm),
                     address<float>(mlp_norm),
                     address<float>(query_norm),
                     address<float>(key_norm),
                     window,
                     cache};
  check(layer.qkv.out() == width + 2 * self.shape().kv_heads * self.shape().head_dim, "qkv has another width");
  check(layer.output.out() == hidden && layer.down.out() == hidden, "a layer's results are as wide as its input");
  self.add_layer(std::move(layer));
}

PagedStep step_of(int64_t sequences, int64_t tokens, int64_t table_width, uintptr_t query_starts, uintptr_t contexts,
                  uintptr_t tables, uintptr_t slots) {
  return {sequences,
          tokens,
          table_width,
          address<int32_t>(query_starts),
          address<int32_t>(contexts),
          address<int32_t>(tables),
          address<int64_t>(slots),
          nullptr,
          nullptr};
}

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<IntegerWeight>(m, "IntegerWeight", "A quantized weight [out, in] that meets activations of 8 bits.")
      .def("__init__", &pack_integers, nb::arg("multiplier"), nb::arg("codes"), nb::arg("groups"), nb::arg("scales"),
           nb::arg("scale_bytes").none(), nb::arg("zeros").none(), nb::arg("minimums").none(),
           nb::arg("minimum_bytes").none(), nb::arg("bias").none(), nb::arg("order").none(), nb::arg("bits"),
           nb::arg("fp4"), nb::arg("whole_rows"), nb::arg("longest_step"))
      .def_prop_ro("out_features", &IntegerWeight::out)
      .def_prop_ro("in_features", &IntegerWeight::in)
      .def_prop_ro("nbytes", &IntegerWeight::bytes);

  nb::class_<DenseWeight>(m, "DenseWeight", "A weight [out, in] of bfloat16, float16 or FP8.")
      .def("__init__", &pack_dense, nb::arg("values"), nb::arg("bfloat16"), nb::arg("bias").none())
      .def("__init__", &pack_fp8, nb::arg("codes"), nb::arg("scales"), nb::arg("rows_in_fp8"), nb::arg("bias").none())
      .def_prop_ro("out_features", &DenseWeight::out)
      .def_prop_ro("in_features", &DenseWeight::in)
      .def_prop_ro("nbytes", &DenseWeight::bytes);

  nb::class_<Decoder>(m, "Decoder", "All layers of a model; tensors are given by address and kept alive by the caller.")
      .def("__init__", &make_decoder, nb::arg("multiplier"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"),
           nb::arg("rotated"), nb::arg("block_size"), nb::arg("eps"), nb::arg("cache"), nb::arg("embedding"),
           nb::arg("embedding_dtype"), nb::arg("hidden"), nb::arg("norm"), nb::arg("head"), nb::arg("frequencies"))
      .def("add_layer", &add_layer, nb::arg("qkv"), nb::arg("output"), nb::arg("gate_up"), nb::arg("down"),
           nb::arg("input_norm"), nb::arg("mlp_norm"), nb::arg("query_norm"), nb::arg("key_norm"), nb::arg("window"),
           nb::arg("cache"))
      .def(
          "hidden",
          [](Decoder& self, int64_t sequences, int64_t tokens, int64_t table_width, uintptr_t query_starts,
             uintptr_t contexts, uintptr_t tables, uintptr_t slots, uintptr_t ids, uintptr_t positions, uintptr_t out) {
            self.hidden(step_of(sequences, tokens, table_width, query_starts, contexts, tables, slots),
                        address<int64_t>(ids), address<int64_t>(positions), reinterpret_cast<float*>(out));
          },
          nb::call_guard<nb::gil_scoped_release>(), "The normed last hidden states [tokens, hidden].")
      .def(
          "logits",
          [](Decoder& self, int64_t sequences, int64_t tokens, int64_t table_width, uintptr_t query_starts,
             uintptr_t contexts, uintptr_t tables, uintptr_t slots, uintptr_t ids, uintptr_t positions, uintptr_t rows,
             int64_t count, uintptr_t out) {
            self.logits(step_of(sequences, tokens, table_width, query_starts, contexts, tables, slots),
                        address<int64_t>(ids), address<int64_t>(positions), address<int64_t>(rows), count,
                        reinterpret_cast<float*>(out));
          },
          nb::call_guard<nb::gil_scoped_release>(), "Logits [count, vocabulary] after the tokens at `rows`.");
}

void bind_rounded_products(nb::class_<Multiplier>& multiplier) {
  multiplier.def(
      "multiply_rounded",
      [](Multiplier& self, nb::handle weight, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t y,
         int64_t y_stride) {
        const Part part = part_of(weight);
        nb::gil_scoped_release release;
        self.multiply_rounded(part, x, x_stride, rows, y, y_stride);
      },
      nb::arg("weight"), nb::arg("x"), nb::arg("x_stride"), nb::arg("rows"), nb::arg("y"), nb::arg("y_stride"),
      "The same for an IntegerWeight or a DenseWeight, with activations rounded to 8 or 16 bits.");
}

}  // namespace llmopt
