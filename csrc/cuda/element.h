// The number types of kernels that are compiled without torch.

#pragma once

namespace pcx {

enum class Element { kFloat, kBFloat16, kHalf };

}  // namespace pcx
