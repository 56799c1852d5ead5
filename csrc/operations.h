// What pcx._C registers with torch, on Python's word that it has defined the same schemas: torch
// ends the process where they differ.

#pragma once

namespace pcx {

constexpr int kSchemas = 11;  // as SCHEMAS in pcx/ops/registration.py

void register_autograd();
void register_cpu();
void register_cpu_scores();
void register_cpu_pagerank();
void register_cuda();
void register_cuda_pagerank();
void register_cuda_token_choice();

}  // namespace pcx
