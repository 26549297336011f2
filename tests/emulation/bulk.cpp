#include "bulk.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "clocks.h"
#include "shared.h"
#include "watch.h"

namespace nf::emulation {
namespace {

constexpr int kAtom = 1024;  // bytes in which the swizzle repeats

struct Store {
  Matrix to;
  int64_t row, column;
  const unsigned char* from;
  int group;
  std::vector<unsigned char> read;  // once it is: the box by rows
};

// The stores of one thread.
struct Stores {
  int reader = 0, writer = 0;  // agents, 0 for none yet
  int open_group = 0;
  std::vector<uint64_t> closed;  // when each group was
  std::vector<Store> in_flight;
};
Stores stores_of[kMaxThreads];

// The part of a row of the box that lies within the matrix.
struct Part {
  unsigned char* at;     // in the matrix
  int64_t first, bytes;  // in the row
};
Part part_of(const Matrix& matrix, int64_t row, int64_t column) {
  const int64_t width = kBoxBytes / matrix.item;
  const int64_t first = std::clamp<int64_t>(-column, 0, width);
  const int64_t end = std::clamp<int64_t>(matrix.columns - column, first, width);
  if (row < 0 || row >= matrix.rows || first == end) return {nullptr, 0, 0};
  return {matrix.data + (row * matrix.stride + column + first) * matrix.item, first * matrix.item,
          (end - first) * matrix.item};
}

template <class F>
void for_each_part(const Matrix& matrix, int64_t row, int64_t column, const F& f) {
  for (int r = 0; r < matrix.box_rows; ++r) {
    const Part part = part_of(matrix, row + r, column);
    if (part.bytes > 0) f(r, part);
  }
}

void check_box(const char* kind, const Matrix& matrix, int64_t row, int64_t column, const void* shared) {
  const size_t bytes = size_t(matrix.box_rows) * kBoxBytes;
  if (reinterpret_cast<uintptr_t>(shared) % kAtom != 0)
    fail("%s at %p in shared memory, which is not a multiple of %d", kind, shared, kAtom);
  if (!is_shared(shared) || !is_in_one_array(shared, bytes))
    fail("%s of %zu bytes at %p, which are not in one shared array", kind, bytes, shared);
  if (row != int(row) || column != int(column))
    fail("%s at row %ld, column %ld", kind, long(row), long(column));
}

// Where the 16 bytes number `chunk` of a row of a box lie.
int64_t swizzled(int row, int chunk) { return int64_t(row) * kBoxBytes + (chunk ^ row % 8) * 16; }

// Copies a box between where it lies in shared memory and its rows in a row.
template <bool kToShared, class Shared, class Plain>
void copy_box(int rows, Shared* shared, Plain* plain) {
  for (int row = 0; row < rows; ++row)
    for (int chunk = 0; chunk < kBoxBytes / 16; ++chunk) {
      auto* in_box = shared + swizzled(row, chunk);
      auto* in_row = plain + row * kBoxBytes + chunk * 16;
      if constexpr (kToShared)
        memcpy(in_box, in_row, 16);
      else
        memcpy(in_row, in_box, 16);
    }
}

void read(Store& store) {
  store.read.resize(size_t(store.to.box_rows) * kBoxBytes);
  copy_box<false>(store.to.box_rows, store.from, store.read.data());
}

void write(const Store& store) {
  for_each_part(store.to, store.row, store.column, [&](int r, const Part& part) {
    memcpy(part.at, store.read.data() + r * kBoxBytes + part.first, part.bytes);
  });
}

}  // namespace

int64_t bytes_of(const Load& load) { return int64_t(load.from.box_rows) * kBoxBytes; }

void begin_load(const Load& load, int agent) {
  check_box("load_box", load.from, load.row, load.column, load.to);
  for_each_part(load.from, load.row, load.column,
                [&](int, const Part& part) { agent_reads(agent, part.at, part.bytes, &place.thread, 1); });
  agent_writes(agent, load.to, bytes_of(load));
  memset(load.to, 0xff, bytes_of(load));
}

void land_load(const Load& load) {
  std::vector<unsigned char> box(bytes_of(load));
  for_each_part(load.from, load.row, load.column, [&](int r, const Part& part) {
    memcpy(box.data() + r * kBoxBytes + part.first, part.at, part.bytes);
  });
  copy_box<true>(load.from.box_rows, load.to, box.data());
}

void store_box(const Matrix& to, int64_t row, int64_t column, const void* shared) {
  check_box("store_box", to, row, column, shared);
  Stores& mine = stores_of[place.thread];
  if (mine.reader == 0) {
    mine.reader = new_agent("a bulk store of thread " + std::to_string(place.thread));
    mine.writer = new_agent("a bulk store of thread " + std::to_string(place.thread));
  }
  agent_reads(mine.reader, shared, size_t(to.box_rows) * kBoxBytes, &place.thread, 1);
  for_each_part(to, row, column,
                [&](int, const Part& part) { agent_writes(mine.writer, part.at, part.bytes); });
  mine.in_flight.push_back({to, row, column, static_cast<const unsigned char*>(shared), mine.open_group, {}});
}

void commit_stores() {
  Stores& mine = stores_of[place.thread];
  mine.open_group += 1;
  mine.closed.push_back(tick());
}

void wait_stores(int groups_left, bool only_read) {
  Stores& mine = stores_of[place.thread];
  const int done = mine.open_group - groups_left;  // groups before this one
  if (done <= 0 || mine.reader == 0) return;
  waited_for(mine.reader, mine.closed[done - 1]);
  if (!only_read) waited_for(mine.writer, mine.closed[done - 1]);
  std::erase_if(mine.in_flight, [&](Store& store) {
    if (store.group >= done) return false;
    if (store.read.empty()) read(store);
    if (!only_read) write(store);
    return !only_read;
  });
}

void stores_begin() {
  for (int thread = 0; thread < place.threads; ++thread) stores_of[thread] = {};
}

void stores_end() {
  for (const Store& store : stores_of[place.thread].in_flight) {
    if (store.read.empty())
      fail("exits with a store_box %s", store.group == stores_of[place.thread].open_group
                                            ? "that no commit_stores closed"
                                            : "that no wait_stores waited for");
    write(store);
  }
}

}  // namespace nf::emulation
