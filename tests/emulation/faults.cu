// Small kernels, each with a mistake that can be switched on. They prove that the emulation can say
// no: with `faulty` it must refuse or the result must be wrong, without it the result must be right.
// nvcc compiles this file against the real headers too, so that the two sets cannot drift apart.
//
// Every op maps x, float32 [n], to an output of the same shape, with blocks of 64 threads.
#include <torch/csrc/stable/ops.h>

#include <device/arrival.cuh>
#include <device/copy_async.cuh>
#include <device/exp2.cuh>
#include <device/launch.cuh>
#include <device/shared_memory.cuh>
#include <device/tensor_core.cuh>
#include <device/vector.cuh>
#include <device/warp.cuh>
#include <limits>

namespace {

using namespace nf;
using torch::stable::Tensor;

constexpr int kThreads = 64;

NF_DEVICE int64_t thread_of_grid() { return block_id() * threads_per_block() + thread_id(); }

// Reverses each block's 64 values through shared memory. Faulty: a thread reads what another has
// perhaps not written yet.
template <bool kFaulty>
NF_KERNEL(kThreads)
missing_barrier(float* out, const float* x) {
  SharedMemory shared;
  float* tile = shared.take<float>(kThreads);
  tile[thread_id()] = x[thread_of_grid()];
  if (!kFaulty) sync_block();
  out[thread_of_grid()] = tile[kThreads - 1 - thread_id()];
}

// The same within a warp. Faulty: a shuffle stands where the barrier should. It makes the lanes meet,
// and so seems to help, but it orders no memory.
template <bool kFaulty>
NF_KERNEL(kThreads)
missing_warp_barrier(float* out, const float* x) {
  SharedMemory shared;
  float* tile = shared.take<float>(kThreads);
  tile[thread_id()] = x[thread_of_grid()];
  if (kFaulty) {
    shuffle_xor(0, 1);
  } else {
    sync_warp();
  }
  out[thread_of_grid()] = tile[thread_id() ^ 31];
}

// Halves of a warp, each on its own, reverse their values. Faulty: a half reads from the other, with
// which it never met.
template <bool kFaulty>
NF_KERNEL(kThreads)
barrier_of_half_a_warp(float* out, const float* x) {
  SharedMemory shared;
  float* tile = shared.take<float>(kThreads);
  tile[thread_id()] = x[thread_of_grid()];
  sync_warp(lane_id() < 16 ? 0x0000ffffu : 0xffff0000u);
  out[thread_of_grid()] = tile[thread_id() ^ (kFaulty ? 31 : 15)];
}

// Counts the positive values of a block in shared memory. Faulty: with a plain addition, where two
// threads may read the same count before either writes.
template <bool kFaulty>
NF_KERNEL(kThreads)
plain_increment(float* out, const float* x) {
  SharedMemory shared;
  int* count = shared.take<int>(1);
  if (thread_id() == 0) *count = 0;
  sync_block();
  if (x[thread_of_grid()] > 0) {
    if (kFaulty) {
      *count += 1;
    } else {
      atomic_add(count, 1);
    }
  }
  sync_block();
  out[thread_of_grid()] = static_cast<float>(*count);
}

// One tile used twice. Faulty: the second round overwrites it while others still read the first.
template <bool kFaulty>
NF_KERNEL(kThreads)
missing_second_barrier(float* out, const float* x) {
  SharedMemory shared;
  float* tile = shared.take<float>(kThreads);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[thread_id()] = x[thread_of_grid()] * static_cast<float>(round + 1);
    sync_block();
    sum += tile[kThreads - 1 - thread_id()];
    if (!kFaulty) sync_block();
  }
  out[thread_of_grid()] = sum;
}

// Copies n values. Faulty: <= for <.
template <bool kFaulty>
NF_KERNEL(kThreads)
tail_in_global(float* out, const float* x, int64_t n) {
  const int64_t i = thread_of_grid();
  if (kFaulty ? i <= n : i < n) out[i] = x[i];
}

// Shifts a block's values by one through shared memory. Faulty: the array is one too short.
template <bool kFaulty>
NF_KERNEL(kThreads)
tail_in_shared(float* out, const float* x) {
  SharedMemory shared;
  float* tile = shared.take<float>(kThreads + (kFaulty ? 0 : 1));
  shared.take<float>(1);  // a neighbour, into which the step too far would go unnoticed
  if (thread_id() == 0) tile[0] = 0;
  tile[thread_id() + 1] = x[thread_of_grid()];
  sync_block();
  out[thread_of_grid()] = tile[thread_id()];
}

// Every thread stores its block's sum. Faulty: where x ends before the block, shared memory keeps
// what happened to be in it.
template <bool kFaulty>
NF_KERNEL(kThreads)
uninitialised_shared(float* out, const float* x, int64_t n) {
  SharedMemory shared;
  float* tile = shared.take<float>(kThreads);
  const bool inside = thread_of_grid() < n;
  if (inside || !kFaulty) tile[thread_id()] = inside ? x[thread_of_grid()] : 0.0f;
  sync_block();
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += tile[i];
  if (inside) out[thread_of_grid()] = sum;
}

// The lower half of each warp swaps neighbours. Faulty: the mask also names the upper half, which
// never comes.
template <bool kFaulty>
NF_KERNEL(kThreads)
wrong_mask(float* out, const float* x) {
  float value = x[thread_of_grid()];
  if (lane_id() < 16) value = shuffle_xor(value, 1, kFaulty ? kFullMask : 0x0000ffffu);
  out[thread_of_grid()] = value;
}

// Halves of a warp swap neighbours each on their own. Faulty: one lane takes its partner for alone.
template <bool kFaulty>
NF_KERNEL(kThreads)
different_masks(float* out, const float* x) {
  unsigned mask = lane_id() < 16 ? 0x0000ffffu : 0xffff0000u;
  if (kFaulty && lane_id() == 5) mask = 0x00000030u;
  out[thread_of_grid()] = shuffle_xor(x[thread_of_grid()], 1, mask);
}

// Mirrors the lower half of each warp. Faulty: it reaches for the upper half, which is not asked.
template <bool kFaulty>
NF_KERNEL(kThreads)
source_outside_mask(float* out, const float* x) {
  float value = x[thread_of_grid()];
  if (lane_id() < 16) value = shuffle(value, (kFaulty ? 31 : 15) - lane_id(), 0x0000ffffu);
  out[thread_of_grid()] = value;
}

// Neighbours swap. Faulty: one thread has left before.
template <bool kFaulty>
NF_KERNEL(kThreads)
exited_lane(float* out, const float* x) {
  const float value = x[thread_of_grid()];
  out[thread_of_grid()] = value;
  if (kFaulty && thread_id() == 40) return;
  out[thread_of_grid()] = shuffle_xor(value, 1);
}

// Reads element (row, column) of a matrix so large that only a part of it is here: the part that
// begins at the matrix's element number `first`. Faulty: the number is computed in 32 bits.
template <bool kFaulty>
NF_KERNEL(kThreads)
index_overflow(float* out, const float* x, int row, int columns, int64_t first) {
  const int64_t begin = kFaulty ? row * columns : static_cast<int64_t>(row) * columns;
  out[thread_of_grid()] = x[begin - first + thread_of_grid()];
}

// Two halves of a block, each on its way to a barrier. Faulty: not to the same one.
template <bool kFaulty>
NF_KERNEL(kThreads)
divergent_barrier(float* out, const float* x) {
  if (kFaulty && warp_id() == 1) {
    sync_block();
  } else {
    sync_block();
  }
  out[thread_of_grid()] = x[thread_of_grid()];
}

// Faulty: threads without work leave, and the others wait for them.
template <bool kFaulty>
NF_KERNEL(kThreads)
early_exit(float* out, const float* x, int64_t n) {
  const bool inside = thread_of_grid() < n;
  if (kFaulty && !inside) return;
  sync_block();
  if (inside) out[thread_of_grid()] = x[thread_of_grid()];
}

// Reverses each block by asynchronous copies, 16 of them, one per thread.
template <bool kWait, bool kBarrier>
NF_DEVICE void reverse_by_copies(float* out, const float* x) {
  SharedMemory shared;
  float* tile = shared.take<float>(kThreads);
  const int at = 4 * thread_id();
  if (at < kThreads) copy_async_16(tile + at, x + block_id() * kThreads + at, true);
  copy_async_commit();
  if (kWait) copy_async_wait<0>();
  if (kBarrier) sync_block();
  out[thread_of_grid()] = tile[kThreads - 1 - thread_id()];
}

template <bool kFaulty>
NF_KERNEL(kThreads)
missing_copy_wait(float* out, const float* x) {
  reverse_by_copies<!kFaulty, true>(out, x);
}

template <bool kFaulty>
NF_KERNEL(kThreads)
missing_copy_barrier(float* out, const float* x) {
  reverse_by_copies<true, !kFaulty>(out, x);
}

// Two copies in flight, the first waited for. Faulty: the wait leaves both in flight.
template <bool kFaulty>
NF_KERNEL(kThreads)
wrong_copy_group(float* out, const float* x) {
  SharedMemory shared;
  float* first = shared.take<float>(4 * kThreads);
  float* second = shared.take<float>(4 * kThreads);
  copy_async_16(first + 4 * thread_id(), x + thread_of_grid() / 4 * 4, true);
  copy_async_commit();
  copy_async_16(second + 4 * thread_id(), x, false);
  copy_async_commit();
  copy_async_wait<kFaulty ? 2 : 1>();
  const float value = first[4 * thread_id() + thread_id() % 4];
  copy_async_wait<0>();
  out[thread_of_grid()] = value + second[4 * thread_id()];
}

// Copies 16 bytes at a time. Faulty: from an address that is no multiple of 16.
template <bool kFaulty>
NF_KERNEL(kThreads)
misaligned_vector(float* out, const float* x, int64_t n) {
  const int64_t at = 4 * thread_of_grid();
  if (at >= n) return;
  auto four = load_vector<4>(x + at);
  if (kFaulty) four = load_vector<4>(x + at + 1);
  if (block_id() % 3 == 0) {
    store_vector(out + at, as_stored(four));
  } else if (block_id() % 3 == 1) {
    store_vector_global(out + at, four);
  } else {
    store_vector_streaming(out + at, four);
  }
}

// Faulty: takes one float more than the launch has room for.
template <bool kFaulty>
NF_KERNEL(kThreads)
take_too_much(float* out, const float* x) {
  SharedMemory shared;
  float* tile = shared.take<float>(kThreads + (kFaulty ? 1 : 0));
  tile[thread_id()] = x[thread_of_grid()];
  out[thread_of_grid()] = tile[thread_id()];
}

// Faulty: the threads do not agree on what is in shared memory.
template <bool kFaulty>
NF_KERNEL(kThreads)
take_differently(float* out, const float* x) {
  SharedMemory shared;
  float* tile = shared.take<float>(kFaulty && thread_id() == 3 ? 2 * kThreads : kThreads);
  tile[thread_id()] = x[thread_of_grid()];
  out[thread_of_grid()] = tile[thread_id()];
}

// Faulty: the caller promises what is not so.
template <bool kFaulty>
NF_KERNEL(kThreads)
broken_promise(float* out, const float* x, int64_t n) {
  NF_DEVICE_CHECK(!kFaulty || thread_of_grid() + 1 < n, "expected less than %d, got %d", static_cast<int>(n),
                  static_cast<int>(thread_of_grid() + 1));
  out[thread_of_grid()] = x[thread_of_grid()];
}

// Each thread writes its own place. Faulty: and first reads its neighbour's, which belongs to another
// thread and perhaps to another block.
template <bool kFaulty>
NF_KERNEL(kThreads)
neighbour_in_global(float* out, const float* x) {
  const int64_t i = thread_of_grid();
  out[i] = x[i] + (kFaulty && i > 0 ? out[i - 1] : 0.0f);
}

// Every block writes its number to the same place. Faulty: plainly, and who was last decides.
template <bool kFaulty>
NF_KERNEL(kThreads)
blocks_in_one_place(int* highest) {
  if (thread_id() != 0) return;
  if (kFaulty) {
    *highest = static_cast<int>(block_id());
  } else {
    atomic_add(highest, 1);
  }
}

// Copies, and the last block to arrive doubles everything. Faulty: the block with the highest number does.
template <bool kFaulty>
NF_KERNEL(kThreads)
missing_arrival(float* out, const float* x, unsigned* counter) {
  out[thread_of_grid()] = x[thread_of_grid()];
  const bool last = kFaulty ? block_id() == block_count() - 1
                            : last_to_arrive(counter, static_cast<unsigned>(block_count()));
  if (!last) return;
  for (int64_t i = thread_id(); i < block_count() * kThreads; i += kThreads) out[i] *= 2;
}

// Copies. Faulty: after it has arrived, while the last block may be at work.
template <bool kFaulty>
NF_KERNEL(kThreads)
late_write(float* out, const float* x, unsigned* counter) {
  if (!kFaulty) out[thread_of_grid()] = x[thread_of_grid()];
  last_to_arrive(counter, static_cast<unsigned>(block_count()));
  if (kFaulty) out[thread_of_grid()] = x[thread_of_grid()];
}

// Not a fault but a clock: who comes when.
NF_KERNEL(kThreads) arrivals(int* arrived, int* out) { out[thread_of_grid()] = atomic_add(arrived, 1); }

template <bool kFaulty>
NF_KERNEL(kThreads)
copy(float* out, const float* x, int64_t n) {
  for (int64_t i = thread_of_grid(); i < n; i += block_count() * threads_per_block()) out[i] = x[i];
}

// The launches. `blocks` covers x exactly or, for kernels that take n, with a block that is partly
// empty.

struct Call {
  explicit Call(const Tensor& x)
      : queue(x),
        output(torch::stable::empty_like(x)),
        out(static_cast<float*>(output.mutable_data_ptr())),
        in(static_cast<const float*>(x.const_data_ptr())),
        n(x.numel()),
        blocks((n + kThreads - 1) / kThreads) {}

  Queue queue;
  Tensor output;
  float* out;
  const float* in;
  int64_t n, blocks;
  size_t tile = shared_bytes<float>(kThreads);
};

#define WITHOUT_SIZE(name, bytes)                                                                          \
  Tensor name##_op(const Tensor& x, bool faulty) {                                                         \
    Call call(x);                                                                                          \
    launch(#name, call.queue, faulty ? name<true> : name<false>, {call.blocks}, kThreads, bytes, call.out, \
           call.in);                                                                                       \
    return call.output;                                                                                    \
  }
#define WITH_SIZE(name, bytes)                                                                             \
  Tensor name##_op(const Tensor& x, bool faulty) {                                                         \
    Call call(x);                                                                                          \
    launch(#name, call.queue, faulty ? name<true> : name<false>, {call.blocks}, kThreads, bytes, call.out, \
           call.in, call.n);                                                                               \
    return call.output;                                                                                    \
  }
WITHOUT_SIZE(missing_barrier, call.tile)
WITHOUT_SIZE(missing_warp_barrier, call.tile)
WITHOUT_SIZE(barrier_of_half_a_warp, call.tile)
WITHOUT_SIZE(plain_increment, shared_bytes<int>(1))
WITHOUT_SIZE(missing_second_barrier, call.tile)
WITH_SIZE(tail_in_global, 0)
WITHOUT_SIZE(tail_in_shared, call.tile + shared_bytes<float>(1) + shared_bytes<float>(1))
WITH_SIZE(uninitialised_shared, call.tile)
WITHOUT_SIZE(wrong_mask, 0)
WITHOUT_SIZE(different_masks, 0)
WITHOUT_SIZE(source_outside_mask, 0)
WITHOUT_SIZE(exited_lane, 0)
WITHOUT_SIZE(divergent_barrier, 0)
WITH_SIZE(early_exit, 0)
WITHOUT_SIZE(missing_copy_wait, call.tile)
WITHOUT_SIZE(missing_copy_barrier, call.tile)
WITHOUT_SIZE(wrong_copy_group, 8 * call.tile)
WITH_SIZE(misaligned_vector, 0)
WITHOUT_SIZE(take_too_much, call.tile)
WITHOUT_SIZE(take_differently, 2 * call.tile)
WITH_SIZE(broken_promise, 0)
WITHOUT_SIZE(neighbour_in_global, 0)
#undef WITHOUT_SIZE
#undef WITH_SIZE

Tensor index_overflow_op(const Tensor& x, bool faulty) {
  Call call(x);
  const int row = 1 << 20;
  const int columns = 1 << 14;
  launch("index_overflow", call.queue, faulty ? index_overflow<true> : index_overflow<false>, {call.blocks},
         kThreads, 0, call.out, call.in, row, columns, static_cast<int64_t>(row) * columns);
  return call.output;
}

Tensor blocks_in_one_place_op(const Tensor& x, bool faulty) {
  Call call(x);
  Tensor count = torch::stable::new_zeros(x, {1}, torch::headeronly::ScalarType::Int);
  launch("blocks_in_one_place", call.queue, faulty ? blocks_in_one_place<true> : blocks_in_one_place<false>,
         {call.blocks}, kThreads, 0, static_cast<int*>(count.mutable_data_ptr()));
  return count;
}

#define WITH_COUNTER(name)                                                                             \
  Tensor name##_op(const Tensor& x, bool faulty) {                                                     \
    Call call(x);                                                                                      \
    Tensor counter = torch::stable::new_zeros(x, {1}, torch::headeronly::ScalarType::Int);             \
    launch(#name, call.queue, faulty ? name<true> : name<false>, {call.blocks}, kThreads, 0, call.out, \
           call.in, static_cast<unsigned*>(counter.mutable_data_ptr()));                               \
    return call.output;                                                                                \
  }
WITH_COUNTER(missing_arrival)
WITH_COUNTER(late_write)
#undef WITH_COUNTER

Tensor arrivals_op(const Tensor& x) {
  Call call(x);
  Tensor arrived = torch::stable::new_zeros(x, {1}, torch::headeronly::ScalarType::Int);
  Tensor out = torch::stable::new_empty(x, {call.n}, torch::headeronly::ScalarType::Int);
  launch("arrivals", call.queue, arrivals, {call.blocks}, kThreads, 0,
         static_cast<int*>(arrived.mutable_data_ptr()), static_cast<int*>(out.mutable_data_ptr()));
  return out;
}

Tensor too_much_shared_op(const Tensor& x, bool faulty) {
  Call call(x);
  const size_t most = static_cast<size_t>(call.queue.shared_limit());
  launch("too_much_shared", call.queue, copy<false>, {call.blocks}, kThreads, most + faulty, call.out,
         call.in, call.n);
  return call.output;
}

Tensor too_large_grid_op(const Tensor& x, bool faulty) {
  Call call(x);
  launch("too_large_grid", call.queue, copy<false>, {call.queue.multiprocessors(), faulty ? 65536 : 1},
         kThreads, 0, call.out, call.in, call.n);
  return call.output;
}

Tensor too_many_threads_op(const Tensor& x, bool faulty) {
  Call call(x);
  launch("too_many_threads", call.queue, copy<false>, {call.blocks}, faulty ? 1056 : kThreads, 0, call.out,
         call.in, call.n);
  return call.output;
}

// What has no fault of its own, to be compared with its plain meaning.

// d = a · b on tensor cores, from a [16, 16] and b [16, 8] of 16-bit values, both by rows: ldmatrix
// brings a as it lies and b transposed, as the multiplication wants them.
template <bool kHalf>
NF_KERNEL(kWarp)
matrix_product(float* d, const uint16_t* a, const uint16_t* b) {
  SharedMemory shared;
  uint16_t* a_tile = shared.take<uint16_t>(16 * 16);
  uint16_t* b_tile = shared.take<uint16_t>(16 * 8);
  const int lane = lane_id();
  store_vector(a_tile + 8 * lane, load_vector<8>(a + 8 * lane));
  if (lane < 16) store_vector(b_tile + 8 * lane, load_vector<8>(b + 8 * lane));
  sync_warp();

  // a's four quarters: upper left, lower left, upper right, lower right.
  uint32_t of_a[4];
  load_matrix_x4(of_a, a_tile + 16 * (lane % 16) + 8 * (lane / 16));
  // b has two; the other two registers are its halves again, and not used.
  uint32_t of_b[4];
  load_matrix_x4_transposed(of_b, b_tile + 8 * (lane % 16));
  const uint32_t halves[2] = {of_b[0], of_b[1]};

  float sum[4] = {};
  if (kHalf) {
    mma_f16(sum, of_a, halves);
  } else {
    mma_bf16(sum, of_a, halves);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2);
    d[8 * row + 2 * (lane % 4) + i % 2] = sum[i];
  }
}

Tensor matrix_product_op(const Tensor& a, const Tensor& b, bool half) {
  Queue queue(a);
  Tensor d = torch::stable::new_empty(a, {16, 8}, torch::headeronly::ScalarType::Float);
  launch("matrix_product", queue, half ? matrix_product<true> : matrix_product<false>, {1}, kWarp,
         shared_bytes<uint16_t>(16 * 16) + shared_bytes<uint16_t>(16 * 8),
         static_cast<float*>(d.mutable_data_ptr()), static_cast<const uint16_t*>(a.const_data_ptr()),
         static_cast<const uint16_t*>(b.const_data_ptr()));
  return d;
}

// d = a · b + c, a [16, 8], b [8, 8] and c [16, 8] of floats by rows, of which a and b are taken as tf32.
NF_KERNEL(kWarp)
tf32_product(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t of_a[4], of_b[2];
  float sum[4];
  for (int r = 0; r < 4; ++r) of_a[r] = a[8 * (g + r % 2 * 8) + t + r / 2 * 4];
  for (int r = 0; r < 2; ++r) of_b[r] = b[8 * (t + r * 4) + g];
  const auto place = [&](int r) { return 8 * (g + r / 2 * 8) + 2 * t + r % 2; };
  for (int r = 0; r < 4; ++r) sum[r] = c[place(r)];
  mma_tf32(sum, of_a, of_b, sum);
  for (int r = 0; r < 4; ++r) d[place(r)] = sum[r];
}

Tensor tf32_product_op(const Tensor& a, const Tensor& b, const Tensor& c) {
  Queue queue(a);
  Tensor d = torch::stable::new_empty(a, {16, 8}, torch::headeronly::ScalarType::Float);
  launch("tf32_product", queue, tf32_product, {1}, kWarp, 0, static_cast<float*>(d.mutable_data_ptr()),
         static_cast<const uint32_t*>(a.const_data_ptr()), static_cast<const uint32_t*>(b.const_data_ptr()),
         static_cast<const float*>(c.const_data_ptr()));
  return d;
}

// Each exchange of a warp once, on values that are the lanes' numbers: out [16, 32].
NF_KERNEL(kWarp)
exchanges(int64_t* out, int* count, unsigned* unsigned_count, int64_t* wide_count) {
  const int lane = lane_id();
  int64_t results[] = {
      shuffle(lane, 7),
      shuffle_xor(lane, 16),
      shuffle_down(lane, 3),
      static_cast<int64_t>(shuffle(lane * 0.5, 31) * 2),
      static_cast<int64_t>(shuffle_xor(lane * 0.5f, 1) * 2),
      shuffle_down(static_cast<unsigned>(lane), 31),
      shuffle(int64_t{1} << lane, 31 - lane),
      warp_any(lane == 31),
      warp_all(lane < 31),
      warp_ballot(lane % 2 == 0),
      lowest_bit(0x80000000u | 0x80000000u >> lane),
      count_bits((1u << lane) - 1u),
      block_id() + 10 * block_count() + 100 * block_y() + 1000 * block_count_y(),
      atomic_add(count, 1),
      atomic_add(unsigned_count, 2u),
      atomic_add(wide_count, int64_t{3}),
  };
  for (int64_t& result : results) out[32 * (&result - results) + lane] = result;
}

Tensor exchanges_op(const Tensor& x) {
  Queue queue(x);
  Tensor out = torch::stable::new_empty(x, {16, 32}, torch::headeronly::ScalarType::Long);
  Tensor counts = torch::stable::new_zeros(x, {3}, torch::headeronly::ScalarType::Long);
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  launch("exchanges", queue, exchanges, {1}, kWarp, 0, static_cast<int64_t*>(out.mutable_data_ptr()),
         reinterpret_cast<int*>(count), reinterpret_cast<unsigned*>(count + 1), count + 2);
  return out;
}

// 2^x of each value.
NF_KERNEL_RESIDENT(kThreads, 2)
powers(float* out, const float* x, int64_t n) {
  if (thread_of_grid() < n) out[thread_of_grid()] = exp2_or_zero(x[thread_of_grid()]);
}

Tensor powers_op(const Tensor& x) {
  Call call(x);
  launch("powers", call.queue, powers, {(call.n + kThreads - 1) / kThreads}, kThreads, 0, call.out, call.in,
         call.n);
  return call.output;
}

// What meeting costs: x.numel() times, every thread of a block meets the others.
NF_KERNEL(1024) meetings(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) sync_block();
}

Tensor meetings_op(const Tensor& x, int64_t threads) {
  Call call(x);
  launch("meetings", call.queue, meetings, {1}, static_cast<int>(threads), 0, call.n);
  return call.output;
}

}  // namespace

// clang-format off
#define FOR_EACH_FAULT(DO) \
  DO(missing_barrier) DO(missing_warp_barrier) DO(barrier_of_half_a_warp) \
  DO(plain_increment) DO(missing_second_barrier) DO(tail_in_global) \
  DO(tail_in_shared) DO(uninitialised_shared) DO(wrong_mask) \
  DO(different_masks) DO(source_outside_mask) DO(exited_lane) \
  DO(index_overflow) DO(divergent_barrier) DO(early_exit) \
  DO(missing_copy_wait) DO(missing_copy_barrier) DO(wrong_copy_group) \
  DO(misaligned_vector) DO(take_too_much) DO(take_differently) \
  DO(broken_promise) DO(neighbour_in_global) DO(blocks_in_one_place) \
  DO(too_much_shared) DO(too_large_grid) DO(too_many_threads) \
  DO(missing_arrival) DO(late_write)
// clang-format on

STABLE_TORCH_LIBRARY(NF_NAMESPACE, m) {
#define DEFINE(name) m.def(#name "(Tensor x, bool faulty) -> Tensor");
  FOR_EACH_FAULT(DEFINE)
  m.def("matrix_product(Tensor a, Tensor b, bool half) -> Tensor");
  m.def("tf32_product(Tensor a, Tensor b, Tensor c) -> Tensor");
  m.def("arrivals(Tensor x) -> Tensor");
  m.def("powers(Tensor x) -> Tensor");
  m.def("exchanges(Tensor x) -> Tensor");
  m.def("meetings(Tensor x, int threads) -> Tensor");
}

NF_CUDA_LIBRARY(m) {
#define IMPLEMENT(name) m.impl(#name, TORCH_BOX(&name##_op));
  FOR_EACH_FAULT(IMPLEMENT)
  m.impl("matrix_product", TORCH_BOX(&matrix_product_op));
  m.impl("tf32_product", TORCH_BOX(&tf32_product_op));
  m.impl("arrivals", TORCH_BOX(&arrivals_op));
  m.impl("powers", TORCH_BOX(&powers_op));
  m.impl("exchanges", TORCH_BOX(&exchanges_op));
  m.impl("meetings", TORCH_BOX(&meetings_op));
}
