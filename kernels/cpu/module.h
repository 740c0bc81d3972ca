// What the files that make the Python module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

namespace llmopt {

namespace nb = nanobind;

class Multiplier;

template <class Element, int kDimensions>
using Array = nb::ndarray<const Element, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;

inline void check(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

// Order: for each packed place the input that stands there, or -1.
inline void check_order(const Array<int32_t, 1>& order, int64_t in) {
  for (size_t i = 0; i < order.shape(0); ++i) {
    check(order(i) >= -1 && order(i) < in, "order names an input that is not there");
  }
}

template <class Element>
const Element* address(uintptr_t value) {
  return reinterpret_cast<const Element*>(value);
}

// Each adds its types, or its methods of Multiplier.
void bind_paged_types(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_rounded_products(nb::class_<Multiplier>& multiplier);
void bind_sampling(nb::class_<Multiplier>& multiplier);
void bind_calibration(nb::class_<Multiplier>& multiplier);

}  // namespace llmopt
