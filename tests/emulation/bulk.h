// Bulk copies of boxes, see device/tensor_map.cuh.
#pragma once

#include <vector>

#include "block.h"

namespace nf::emulation {

constexpr int kBoxBytes = 128;  // of a row of a box

// A matrix in global memory, copied in boxes.
struct Matrix {
  unsigned char* data;
  int item;  // bytes of a value
  int64_t rows, columns, stride;
  int box_rows;
};

// A box whose first value is (row, column), and where it goes.
struct Load {
  Matrix from;
  int64_t row, column;
  unsigned char* to;
};
int64_t bytes_of(const Load& load);
// The load begins, and is what `agent` does; its place holds NaN until it lands.
void begin_load(const Load& load, int agent);
void land_load(const Load& load);

void store_box(const Matrix& to, int64_t row, int64_t column, const void* shared);
void commit_stores();
void wait_stores(int groups_left, bool only_read);

void stores_begin();
void stores_end();  // of the running thread, which exits

}  // namespace nf::emulation
