// What the host side of the CUDA kernels says about a tensor's elements.

#pragma once

enum class Element { float32, bfloat16, float16 };
