// Registration of a file's implementations of pcx's ops, whose schemas Python defines.

#pragma once

#include <torch/library.h>

#include <source_location>

namespace pcx {

// Equal to SCHEMAS in pcx/ops/library.py, which does not use an extension with another number.
constexpr int kSchemas = 15;

using Implement = void (*)(torch::Library&);

// One file's implementations for one dispatch key. A file defines a static object of this type. Its
// constructor puts the function into a list when the extension is loaded, so nothing else needs to
// know of the file. Python calls `register_operations` after it has compared `kSchemas` with its
// own number. Torch then compares every implementation with the schema that Python defines.
struct Implementations {
  Implementations(c10::DispatchKey key, Implement implement,
                  std::source_location where = std::source_location::current());
};

void register_operations();

}  // namespace pcx
