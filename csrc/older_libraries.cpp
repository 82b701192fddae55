// What newer compilers would ask of the C++ library, so that the one of manylinux_2_28 (GLIBCXX_3.4.25) has all the
// rest.
#include <new>

namespace std {

// std::vector calls this for a size beyond all memory, in GLIBCXX_3.4.29 and later.
__attribute__((visibility("hidden"))) void __throw_bad_array_new_length() { throw std::bad_alloc(); }

}  // namespace std
