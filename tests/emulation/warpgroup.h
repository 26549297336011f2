// Products of warpgroups, see device/warpgroup.cuh. As late as the rules allow: a product reads its factors in
// shared memory when the first thread waits for it, and from its start to a thread's wait that thread's registers of
// d hold NaN.
#pragma once

#include <initializer_list>

#include "block.h"

namespace nf::emulation {

enum class Number { kHalf, kBFloat16, kTf32 };

// What a thread brings to a product.
struct Product {
  Number number;
  bool add;
  float* d;
  int registers;      // of d; the product has twice as many columns
  const uint32_t* a;  // [4], or null, and then it is in shared memory
  uint64_t a_descriptor, b_descriptor;
  bool a_rows_of_k, b_rows_of_k;
};
void start_product(const Product& product, Where where);

// How many chains of products of the block have not been waited for; while there are, whoever reads or writes a local
// variable asks whether it is a register of theirs.
extern int products_in_flight;
void check_registers(const void* address);

struct Registers {
  const void* at;
  size_t bytes;
};
void fence_products(std::initializer_list<Registers> registers);
void commit_products();
void wait_products(int groups_left, std::initializer_list<Registers> registers);

// setmaxnreg
void set_registers(bool up, int count, Where where);

void budget_begins();

void products_begin();
void products_end();  // of the running thread, which exits

}  // namespace nf::emulation
