"""Kernels: `_cpu` is compiled from cpu/ where there is a C++ compiler; see README.md beside this file."""
