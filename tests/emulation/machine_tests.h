// What the test kernels of machine_tests.cpp and hopper_tests.cpp share.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.cuh"

namespace py = pybind11;

void bind_hopper(py::module_& module);

// Makes a numpy array visible to kernels for the length of a call.
template <class T, class Array>
T* visible(Array& array, bool writable = true) {
  const void* data = array.data();
  return reinterpret_cast<T*>(emulation::machine().register_array(const_cast<void*>(data), array.nbytes(), writable));
}

inline void run(int blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  emulation::machine().launch({static_cast<unsigned>(blocks), 1, 1}, threads, shared_bytes, kernel);
  emulation::machine().forget_arrays();
}
