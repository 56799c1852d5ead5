// Rows of numbers in memory, whose type is known at run time.

#pragma once

#include "element.h"

namespace pcx {

constexpr int kWidestNorm = 2048;  // numbers in a row, a multiple of 4

struct Rows {
  const void* data;  // null where there are none
  Element type;
};

}  // namespace pcx
