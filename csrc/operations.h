// How a file adds its implementations to the operations of pcx, whose schemas Python defines.

#pragma once

#include <torch/library.h>

#include <source_location>

namespace pcx {

// As SCHEMAS in pcx/ops/library.py, which leaves an extension with another number out.
constexpr int kSchemas = 12;

using Implement = void (*)(torch::Library&);

// One file's implementations for one dispatch key. A file defines a static object of this type,
// which keeps the function in a list when the extension is loaded; nothing else needs to know of
// the file. Python calls `register_operations` once it knows that `kSchemas` is its own number;
// torch then compares every implementation with the schema that Python defines.
struct Implementations {
  Implementations(c10::DispatchKey key, Implement implement,
                  std::source_location where = std::source_location::current());
};

void register_operations();

}  // namespace pcx
