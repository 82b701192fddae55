// How a function becomes an operation of torch.ops.dalle_kernels_cpu, over torch_abi.h.
//
//   const Operators defined("CPU", {{"name(Tensor x, float y) -> Tensor", boxed<&function>}});
//
// Python registers them all, in a namespace of its choice: copies of the library do not get in each other's way.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor.h"

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
    require(inputs == sizeof...(Arguments), "an operation's schema and its function part");
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

struct Operator {
  const char* dispatch_key;
  const char* schema;
  void (*function)(StableIValue*, uint64_t, uint64_t);
};

std::vector<Operator>& operators();

struct Operators {
  struct Entry {
    const char* schema;
    void (*function)(StableIValue*, uint64_t, uint64_t);
  };

  Operators(const char* dispatch_key, std::initializer_list<Entry> entries) {
    for (const Entry& entry : entries) operators().push_back({dispatch_key, entry.schema, entry.function});
  }
};

// Tells torch of all operators. It never forgets them: torch does not expect libraries to be unloaded.
void register_operators(const char* name_space);

}  // namespace dalle
