// Types of numbers, as kernels that know nothing of torch take them.

#pragma once

namespace pcx {

enum class Element { kFloat, kBFloat16, kHalf };

}  // namespace pcx
