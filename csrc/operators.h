// How a function becomes an operation of torch.ops.dalle_kernels_cpu, over torch_abi.h.
//
//   const Operators operators("CPU", {{"name(Tensor x, float y) -> Tensor", boxed<&function>}});
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tensor.h"

#if !defined(DALLE_LIBRARY)
#define DALLE_LIBRARY dalle_kernels_cpu
#endif
#define DALLE_QUOTED(name) #name
#define DALLE_NAME(name) DALLE_QUOTED(name)

namespace dalle {

// torch's arguments are ours to free once taken; results are torch's.
template <class T>
struct Value {
  static_assert(std::is_same_v<T, int64_t> || std::is_same_v<T, double> || std::is_same_v<T, bool>);
  static T take(StableIValue value) {
    T taken;
    std::memcpy(&taken, &value, sizeof(T));
    return taken;
  }
};
template <>
struct Value<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(reinterpret_cast<AtenTensorHandle>(value)); }
  static StableIValue give(Tensor&& tensor) { return reinterpret_cast<StableIValue>(tensor.release()); }
};
template <class T>
struct Value<std::optional<T>> {
  static std::optional<T> take(StableIValue value) {
    auto* inner = reinterpret_cast<StableIValue*>(value);
    if (inner == nullptr) return std::nullopt;
    std::optional<T> taken(Value<T>::take(*inner));
    delete inner;
    return taken;
  }
};

template <auto function>
struct Boxed;
template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t inputs, uint64_t) {
    require<std::logic_error>(inputs == sizeof...(Arguments), "an operation's schema and its function part");
    call(stack, std::index_sequence_for<Arguments...>());
  }

 private:
  template <size_t... i>
  static void call(StableIValue* stack, std::index_sequence<i...>) {
    const std::tuple<std::remove_cvref_t<Arguments>...> arguments{
        Value<std::remove_cvref_t<Arguments>>::take(stack[i])...};
    give(stack, std::apply(function, arguments));
  }

  static void give(StableIValue* stack, Tensor&& result) { *stack = Value<Tensor>::give(std::move(result)); }
  template <class... Results>
  static void give(StableIValue* stack, std::tuple<Results...>&& results) {
    std::apply([&](Results&... each) { ((*stack++ = Value<Results>::give(std::move(each))), ...); }, results);
  }
};
template <auto function>
constexpr void (*boxed)(StableIValue*, uint64_t, uint64_t) = &Boxed<function>::call;

// Defines operations when the library is loaded and serves them on `dispatch_key`; torch forgets them never, as it does
// not expect libraries to be unloaded.
struct Operators {
  struct Entry {
    const char* schema;
    void (*function)(StableIValue*, uint64_t, uint64_t);
  };

  Operators(const char* dispatch_key, std::initializer_list<Entry> entries) {
    TorchLibraryHandle schemas = nullptr, kernels = nullptr;
    succeeded(aoti_torch_library_init_fragment(DALLE_NAME(DALLE_LIBRARY), __FILE__, __LINE__, &schemas),
              "open a library");
    succeeded(aoti_torch_library_init_impl(DALLE_NAME(DALLE_LIBRARY), dispatch_key, __FILE__, __LINE__, &kernels),
              "open a library");
    for (const Entry& entry : entries) {
      const std::string schema = entry.schema, name = schema.substr(0, schema.find('('));
      succeeded(aoti_torch_library_def(schemas, entry.schema), "define an operation");
      succeeded(torch_library_impl(kernels, name.c_str(), entry.function, kTorchAbi), "register an operation");
    }
  }
};

}  // namespace dalle
