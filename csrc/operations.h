// What pcx._C registers with torch, on Python's word that it has defined the same schemas: torch
// ends the process where they differ.

#pragma once

namespace pcx {

constexpr int kSchemas = 5;  // as SCHEMAS in pcx/ops/registration.py

void register_cpu();
void register_cpu_scores();
void register_cuda();

}  // namespace pcx
