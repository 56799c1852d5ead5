// How a file adds its implementations to the operations of pcx, whose schemas Python defines.

#pragma once

#include <torch/library.h>

#include <source_location>

namespace pcx {

// As SCHEMAS in pcx/ops/library.py: torch ends the process where the schemas differ.
constexpr int kSchemas = 12;

using Implement = void (*)(torch::Library&);

// One file's implementations for one dispatch key. A file defines a static object of this type,
// which keeps the function in a list when the extension is loaded; nothing else needs to know of
// the file. `register_operations` calls the functions once Python has defined the schemas.
struct Implementations {
  Implementations(c10::DispatchKey key, Implement implement,
                  std::source_location where = std::source_location::current());
};

void register_operations();

}  // namespace pcx
