// An op's arguments are written once, as a struct whose each(f) names its fields in order:
//
//   struct NormalizeArguments {
//     static constexpr const char* kName = "normalize";
//     static constexpr const char* kReturns = "(Tensor y, Tensor norm)";
//     Tensor x;
//     double eps;
//     template <class F> void each(F&& f) { f("x", x); f("eps", eps); }
//   };
//
// From it come the schema (define<NormalizeArguments>(m)) and the reader of the stable ABI's stack, so that a
// kernel is a function of the struct: implement<&normalize>(m), std::tuple<Tensor, Tensor> normalize(const
// NormalizeArguments&). A struct that several ops share is a base, whose each is called in theirs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "checks.h"

namespace nf {

// What a schema calls a type.
template <class T>
struct SchemaType;
template <>
struct SchemaType<Tensor> {
  static constexpr const char* kName = "Tensor";
};
template <>
struct SchemaType<std::optional<Tensor>> {
  static constexpr const char* kName = "Tensor?";
};
template <>
struct SchemaType<double> {
  static constexpr const char* kName = "float";
};
template <>
struct SchemaType<int64_t> {
  static constexpr const char* kName = "int";
};
template <>
struct SchemaType<bool> {
  static constexpr const char* kName = "bool";
};
template <>
struct SchemaType<std::string> {
  static constexpr const char* kName = "str";
};
template <>
struct SchemaType<ScalarType> {
  static constexpr const char* kName = "ScalarType";
};

// The same for an argument of an op that writes to some, which it names in kWritten: "Tensor(a!)?".
template <class Arguments>
std::string type_in_schema(std::string type, const std::string& name) {
  if constexpr (requires { Arguments::kWritten; }) {
    char alias = 'a';
    for (const char* written : Arguments::kWritten) {
      if (name == written) type.insert(6, std::string("(") + alias + "!)");
      ++alias;
    }
  }
  return type;
}

template <class Arguments>
std::string schema() {
  std::string text;
  Arguments().each([&]<class T>(const char* name, T&) {
    text += text.empty() ? "" : ", ";
    text += type_in_schema<Arguments>(SchemaType<T>::kName, name) + ' ' + name;
  });
  return std::string(Arguments::kName) + '(' + text + ") -> " + Arguments::kReturns;
}

template <class Arguments>
void define(torch::stable::detail::StableLibrary& m) {
  m.def(schema<Arguments>().c_str());
}

template <class Result>
void put_results(StableIValue* stack, Result&& result) {
  stack[0] = torch::stable::detail::from<Result>(std::move(result));
}
template <class... Results>
void put_results(StableIValue* stack, std::tuple<Results...>&& results) {
  torch::stable::detail::box_from_tuple(stack, std::move(results));
}

// A tensor can have lost its memory, as a weight that FSDP keeps elsewhere between its forward passes has, or
// never had any: a kernel would read address 0.
inline void check_memory(const char* op, const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  if (bytes == 0 || t.const_data_ptr() == nullptr)
    fail(op, ": expected `", name, "` to have values, got a tensor without memory");
}
inline void check_memory(const char* op, const char* name, const std::optional<Tensor>& t) {
  if (t) check_memory(op, name, *t);
}
template <class T>
void check_memory(const char*, const char*, const T&) {}

// `kernel` as the dispatcher calls it.
template <class Arguments, auto kernel>
void boxed(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments arguments;
  uint64_t place = 0;
  arguments.each([&]<class T>(const char* name, T& field) {
    if (place == count) fail(Arguments::kName, ": expected `", name, "`, got ", count, " arguments");
    field = torch::stable::detail::to<T>(stack[place++]);
    check_memory(Arguments::kName, name, field);
  });
  if (place != count) fail(Arguments::kName, ": expected ", place, " arguments, got ", count);
  if constexpr (std::is_void_v<decltype(kernel(arguments))>)
    kernel(arguments);
  else
    put_results(stack, kernel(arguments));
}

template <auto kernel, class Result, class Arguments>
void implement_as(torch::stable::detail::StableLibrary& m, Result (*)(const Arguments&)) {
  m.impl(Arguments::kName, &boxed<Arguments, kernel>);
}

template <auto kernel>
void implement(torch::stable::detail::StableLibrary& m) {
  implement_as<kernel>(m, kernel);
}

}  // namespace nf
