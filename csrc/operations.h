// What pcx._C registers with torch, on Python's word that it has defined the same schemas: torch
// ends the process where they differ.

#pragma once

namespace pcx {

constexpr int kSchemas = 4;  // as SCHEMAS in pcx/ops/registration.py

void register_cpu();
void register_cuda();

}  // namespace pcx
