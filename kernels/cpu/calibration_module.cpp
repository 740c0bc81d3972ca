// The Python face of gram.h and codes.h: what calibration and the choice of codes ask for.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>

#include "codes.h"
#include "gram.h"
#include "module.h"
#include "multiplier.h"

namespace llmopt {
namespace {

// Those that are written must be taken with noconvert(): what is written to a converted copy is lost.
template <class Element>
using Matrix = nb::ndarray<Element, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class Element>
using Groups = nb::ndarray<Element, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void add_gram_of(Multiplier& multiplier, Matrix<float> gram, Matrix<const float> x) {
  const auto width = static_cast<int64_t>(x.shape(1));
  check(static_cast<int64_t>(gram.shape(0)) == width && static_cast<int64_t>(gram.shape(1)) == width,
        "gram must be [width, width] of x [rows, width]");
  nb::gil_scoped_release unlocked;
  add_gram(multiplier.pool(), multiplier.kernels(), x.data(), static_cast<int64_t>(x.shape(0)), width, gram.data());
}

void round_some_inputs(Multiplier& multiplier, Matrix<const float> weight, Matrix<const float> factor,
                       Array<int64_t, 1> group, Matrix<const float> scale, Matrix<const float> zero,
                       Matrix<float> numbers, Matrix<float> errors, int64_t start, int64_t first, int64_t last,
                       int largest) {
  const size_t inputs = weight.shape(0), outputs = weight.shape(1);
  check(factor.shape(0) == inputs && factor.shape(1) == inputs, "factor must be [inputs, inputs]");
  check(scale.shape(1) == outputs && zero.shape(0) == scale.shape(0) && zero.shape(1) == outputs,
        "scale and zero must be [groups, outputs]");
  const auto groups = static_cast<int64_t>(scale.shape(0));
  check(group.shape(0) == inputs && std::all_of(group.data(), group.data() + inputs,
                                                [&](int64_t g) { return g >= 0 && g < groups; }),
        "group must name a group of scale for each input");
  check(numbers.shape(0) == inputs && numbers.shape(1) == outputs, "numbers must have the shape of weight");
  check(0 <= start && start <= first && first <= last && last <= static_cast<int64_t>(inputs) &&
            last - start <= static_cast<int64_t>(errors.shape(0)) && errors.shape(1) == outputs,
        "start <= first <= last must lie in a block that errors has rows for");
  nb::gil_scoped_release unlocked;
  round_inputs(multiplier.pool(), multiplier.kernels(),
               {weight.data(), factor.data(), group.data(), scale.data(), zero.data(), numbers.data(), errors.data(),
                static_cast<int64_t>(inputs), static_cast<int64_t>(outputs), start, first, last,
                static_cast<float>(largest)});
}

void find_grid_errors(Multiplier& multiplier, Groups<const float> weight, Matrix<const float> scale,
                      Matrix<const float> zero, std::optional<Matrix<const float>> importance,
                      std::optional<Groups<float>> errors, std::optional<Matrix<float>> losses, int largest) {
  const size_t outputs = weight.shape(0), groups = weight.shape(1), size = weight.shape(2);
  const auto has_a_number_a_group = [&](const auto& array) {
    return array.shape(0) == outputs && array.shape(1) == groups;
  };
  check(has_a_number_a_group(scale) && has_a_number_a_group(zero) && (!losses || has_a_number_a_group(*losses)),
        "scale, zero and losses must be [outputs, groups]");
  check(!importance || (importance->shape(0) == groups && importance->shape(1) == size),
        "importance must be [groups, size]");
  check(!errors || (has_a_number_a_group(*errors) && errors->shape(2) == size), "errors must have the shape of weight");
  nb::gil_scoped_release unlocked;
  grid_errors(multiplier.pool(), multiplier.kernels(),
              {weight.data(), scale.data(), zero.data(), importance ? importance->data() : nullptr,
               errors ? errors->data() : nullptr, losses ? losses->data() : nullptr, static_cast<int64_t>(outputs),
               static_cast<int64_t>(groups), static_cast<int64_t>(size), static_cast<float>(largest)});
}

}  // namespace

void bind_calibration(nb::class_<Multiplier>& multiplier) {
  multiplier
      .def("add_gram", &add_gram_of, nb::arg("gram").noconvert(), nb::arg("x"),
           "gram += xᵀ · x, with float32 x [rows, width] rounded to bfloat16.")
      .def("round_inputs", &round_some_inputs, nb::arg("weight"), nb::arg("factor"), nb::arg("group"),
           nb::arg("scale"), nb::arg("zero"), nb::arg("numbers").noconvert(), nb::arg("errors").noconvert(),
           nb::arg("start"), nb::arg("first"), nb::arg("last"), nb::arg("largest"),
           "GPTQ's loop over the inputs first to last - 1 of the block that begins at start: writes their numbers, "
           "0 to largest, and their errors.")
      .def("grid_errors", &find_grid_errors, nb::arg("weight"), nb::arg("scale"), nb::arg("zero"),
           nb::arg("importance").none(), nb::arg("errors").noconvert().none(),
           nb::arg("losses").noconvert().none(), nb::arg("largest"),
           "What float32 [outputs, groups, size] becomes on a grid with whole zero points less what it was, and the "
           "sum of each group's errors squared, times their importance; writes what is asked for.");
}

}  // namespace llmopt
