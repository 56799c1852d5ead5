// The list of all files' implementations.

#include "operations.h"

#include <deque>
#include <vector>

namespace {

struct Entry {
  c10::DispatchKey key;
  pcx::Implement implement;
  std::source_location where;
};

// In a function, since static objects of other files use it while they are made.
std::vector<Entry>& entries() {
  static std::vector<Entry> list;
  return list;
}

}  // namespace

pcx::Implementations::Implementations(c10::DispatchKey key, Implement implement,
                                      std::source_location where) {
  entries().push_back({key, implement, where});
}

void pcx::register_operations() {
  static std::deque<torch::Library> libraries;  // an implementation lasts as long as its library
  for (const Entry& entry : entries()) {
    libraries.emplace_back(torch::Library::IMPL, "pcx", entry.key, entry.where.file_name(),
                           entry.where.line());
    entry.implement(libraries.back());
  }
}
