// The Python face of paged_cache.h. Tensors cross as addresses, which the caller keeps alive.
#include "module.h"

#include <nanobind/stl/string.h>

#include <string>

#include "paged_cache.h"

namespace llmopt {
namespace {

CacheKind kind_of(const std::string& name) {
  if (name == "bfloat16") return CacheKind::kBFloat16;
  if (name == "int8") return CacheKind::kInt8;
  check(name == "fp8", "a paged cache is bfloat16, int8 or fp8");
  return CacheKind::kFp8;
}

void make_shape(AttentionShape* self, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rotated,
                int64_t block_size, int64_t window, float scale, float eps, uintptr_t query_norm, uintptr_t key_norm,
                const std::string& kind) {
  check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "key heads must divide heads");
  check(head_dim > 0 && head_dim % kGroup == 0 && head_dim <= kMostChannels,
        "the head size must be a multiple of 16, at most 256");
  check(block_size > 0 && block_size % kGroup == 0, "the block size must be a multiple of 16");
  check(rotated >= 0 && rotated % 2 == 0 && rotated <= head_dim, "rotated channels must be even and within the head");
  check(window >= 0, "a window cannot be negative");
  new (self) AttentionShape{heads,
                            kv_heads,
                            head_dim,
                            rotated,
                            block_size,
                            window,
                            scale,
                            eps,
                            reinterpret_cast<const float*>(query_norm),
                            reinterpret_cast<const float*>(key_norm),
                            kind_of(kind)};
}

void make_cache(LayerCache* self, uintptr_t keys, uintptr_t values, uintptr_t key_scales, uintptr_t value_scales) {
  new (self) LayerCache{reinterpret_cast<void*>(keys), reinterpret_cast<void*>(values),
                        reinterpret_cast<float*>(key_scales), reinterpret_cast<float*>(value_scales)};
}

void make_step(PagedStep* self, int64_t sequences, int64_t tokens, int64_t table_width, uintptr_t query_starts,
               uintptr_t contexts, uintptr_t tables, uintptr_t slots, uintptr_t cos, uintptr_t sin) {
  new (self) PagedStep{sequences,
                       tokens,
                       table_width,
                       reinterpret_cast<const int32_t*>(query_starts),
                       reinterpret_cast<const int32_t*>(contexts),
                       reinterpret_cast<const int32_t*>(tables),
                       reinterpret_cast<const int64_t*>(slots),
                       reinterpret_cast<const float*>(cos),
                       reinterpret_cast<const float*>(sin)};
}

}  // namespace

void bind_paged_types(nb::module_& m) {
  nb::class_<AttentionShape>(m, "AttentionShape", "What is the same for all steps of a layer; see paged_cache.h.")
      .def("__init__", &make_shape, nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("rotated"),
           nb::arg("block_size"), nb::arg("window"), nb::arg("scale"), nb::arg("eps") = 0.0F,
           nb::arg("query_norm") = 0, nb::arg("key_norm") = 0, nb::arg("kind"));
  nb::class_<LayerCache>(m, "LayerCache", "Addresses of one layer's keys and values; scales of int8 only.")
      .def("__init__", &make_cache, nb::arg("keys"), nb::arg("values"), nb::arg("key_scales") = 0,
           nb::arg("value_scales") = 0);
  nb::class_<PagedStep>(m, "PagedStep", "Where the tokens of one step stand; arrays by address, see paged_cache.h.")
      .def("__init__", &make_step, nb::arg("sequences"), nb::arg("tokens"), nb::arg("table_width"),
           nb::arg("query_starts"), nb::arg("contexts"), nb::arg("tables"), nb::arg("slots"), nb::arg("cos"),
           nb::arg("sin"));
}

}  // namespace llmopt
