// Calls ops by their names from C++, through torch's dispatcher.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace pcx {

template <class Signature>
c10::TypedOperatorHandle<Signature> operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace pcx
