// The list of the implementations of all files.

#include "operations.h"

#include <deque>
#include <vector>

namespace {

struct Entry {
  c10::DispatchKey key;
  pcx::Implement implement;
  std::source_location where;
};

// A function, because the constructors of other files' static objects use the list.
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
  static std::deque<torch::Library> libraries;  // implementations live as long as their library
  for (const Entry& entry : entries()) {
    libraries.emplace_back(torch::Library::IMPL, "pcx", entry.key, entry.where.file_name(),
                           entry.where.line());
    entry.implement(libraries.back());
  }
}
