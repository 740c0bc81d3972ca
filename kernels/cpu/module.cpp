#include <nanobind/nanobind.h>
NB_MODULE(_cpu, m) { m.doc() = "llmopt's CPU kernels"; }
