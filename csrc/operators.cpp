#include "operators.h"

#include <string>

namespace dalle {

std::vector<Operator>& operators() {
  static std::vector<Operator> operators;
  return operators;
}

void register_operators(const char* name_space) {
  for (const Operator& entry : operators()) {
    const std::string schema = entry.schema, name = schema.substr(0, schema.find('('));
    TorchLibraryHandle schemas = nullptr, kernels = nullptr;
    succeeded(aoti_torch_library_init_fragment(name_space, __FILE__, __LINE__, &schemas), "open a library");
    succeeded(aoti_torch_library_init_impl(name_space, entry.dispatch_key, __FILE__, __LINE__, &kernels),
              "open a library");
    succeeded(aoti_torch_library_def(schemas, entry.schema), "define an operation");
    succeeded(torch_library_impl(kernels, name.c_str(), entry.function, kTorchAbi), "register an operation");
  }
}

}  // namespace dalle
