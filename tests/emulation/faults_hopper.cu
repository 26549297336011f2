// What faults.cu is, for the instructions of compute capability 9.0: a matrix product as kernels make them there,
// by copies in bulk, barriers that count bytes, and products of warpgroups, with a mistake that can be switched on.
//
// out[M, N] = a[M, K] · b[N, K]ᵀ in float32, 128 x kN of it a block: one warpgroup loads, two multiply 64 rows each.
#include <torch/csrc/stable/ops.h>

#include <device/launch.cuh>
#include <device/mbarrier.cuh>
#include <device/shared_memory.cuh>
#include <device/tensor_map.cuh>
#include <device/warpgroup.cuh>

namespace {

using namespace nf;

// clang-format off
#define FOR_EACH_FAULT(DO) \
  DO(no_wait_for_loads) DO(wrong_parity_of_consumers) DO(wrong_parity_of_producer) \
  DO(too_few_bytes) DO(too_many_bytes) DO(loaded_twice) \
  DO(freed_before_wgmma_wait) DO(freed_one_too_early) DO(freed_by_one_of_many) \
  DO(factor_overwritten) \
  DO(read_before_wgmma_wait) DO(written_before_wgmma_wait) DO(no_wgmma_wait) \
  DO(no_wgmma_commit) DO(no_wgmma_fence) DO(no_wgmma_fence_of_a) \
  DO(strides_exchanged) DO(lies_otherwise) DO(begins_between) \
  DO(misplaced_box) DO(lost_row) DO(not_swizzled) \
  DO(count_too_high) DO(count_too_low) DO(arrives_twice) \
  DO(no_fence_of_barriers) DO(no_sync_of_barriers) DO(gives_up_unheard) \
  DO(factor_not_fenced) DO(no_fence_for_bulk) DO(fence_after_meeting) \
  DO(no_meeting_before_store) DO(buffer_reused) DO(no_commit_of_stores) \
  DO(no_wait_for_stores) DO(too_many_registers) DO(registers_by_half) \
  DO(wrong_threads) DO(no_turn_given)
// clang-format on

enum Fault {
  none,
#define NAME(name) name,
  FOR_EACH_FAULT(NAME)
#undef NAME
};

// What the right twin does, where it is not the plain product: a in registers, one group of products left in flight, a
// factor that threads have touched.
constexpr bool in_registers(int fault) {
  return fault == no_wgmma_fence_of_a || fault == freed_by_one_of_many;
}
constexpr bool in_flight(int fault) { return fault == freed_one_too_early; }
constexpr bool touched(int fault) { return fault == factor_not_fenced; }

constexpr int kProductThreads = 3 * kWarpgroup;
constexpr int kStages = 2;
constexpr int kRows = 128;
constexpr int kFactorBox = 64 * kBoxBytes;  // of a, and of b lying as rows of k

// What T is in memory.
template <class T>
using Memory = std::conditional_t<std::is_same_v<T, Tf32>, float, T>;

template <int kN>
size_t product_bytes() {
  return shared_bytes<unsigned char>(kStages * 2 * kFactorBox) +
         shared_bytes<unsigned char>(kStages * kN * kBoxBytes) + shared_bytes<unsigned char>(kRows * kN * 4) +
         2 * shared_bytes<Barrier>(kStages);
}

// Where 4 bytes of a box lie, number `word` of a row.
NF_DEVICE uint32_t* word_in_box(void* box, int row, int word) {
  return static_cast<uint32_t*>(box) + row * 32 + (word / 4 ^ row % 8) * 4 + word % 4;
}

// Four fragments of 64 rows of a, loaded as threads load: for products with a in registers.
NF_DEVICE void load_fragments(uint32_t (&a)[4][4], void* box) {
  const int row = thread_id() % kWarpgroup / kWarp * 16 + lane_id() / 4;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    a[i / 4][i % 4] = *word_in_box(box, row + 8 * (i % 2), 8 * (i / 4) + 4 * (i % 4 / 2) + lane_id() % 4);
}

template <class T, Lies kA, Lies kB, int kN, bool kInRegisters, bool kInFlight, bool kTouched, int kFault>
NF_KERNEL_RESIDENT(kProductThreads, 1)
product(NF_TENSOR_MAP of_out, NF_TENSOR_MAP of_a, NF_TENSOR_MAP of_b, int64_t depth) {
  constexpr int kDepth = kBoxBytes / sizeof(Memory<T>);
  constexpr int kBytesOfB = kN * kBoxBytes;
  constexpr bool kAllArrive = kInRegisters || kTouched;  // since each thread has read by itself
  constexpr int kConsumers = kAllArrive && kFault != freed_by_one_of_many ? 2 * kWarpgroup : 2;
  SharedMemory shared;
  auto* const a_stages = shared.take_boxes<unsigned char>(kStages * 2 * kFactorBox);
  auto* const b_stages = shared.take_boxes<unsigned char>(kStages * kBytesOfB);
  auto* const outputs = shared.take_boxes<unsigned char>(kRows * kN * 4);
  Barrier* const full = shared.take<Barrier>(kStages);
  Barrier* const empty = shared.take<Barrier>(kStages);
  if (thread_id() == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, kConsumers + (kFault == count_too_high) - (kFault == count_too_low));
    }
    if (kFault != no_fence_of_barriers) fence_barriers();
  }
  if (kFault != no_sync_of_barriers) sync_block();  // before anybody waits at them

  const int64_t row = block_id() * kRows;
  const int64_t column = block_y() * kN;
  if (warpgroup_id() == 0) {
    if (kFault != registers_by_half || thread_id() >= kWarp) registers_down<40>();
    if (thread_id() == 0) {
      prefetch_map(of_a);
      RingPlace<kStages> place(kFault == wrong_parity_of_producer ? 0 : 1);
      for (int64_t k = 0; k < depth; k += kDepth, place.advance()) {
        Barrier* const loaded = full + place.stage;
        unsigned char* const a = a_stages + place.stage * 2 * kFactorBox;
        unsigned char* const b = b_stages + place.stage * kBytesOfB + (kFault == misplaced_box ? 128 : 0);
        if (kFault != loaded_twice) barrier_wait(empty + place.stage, place.parity);
        barrier_arrive_expect(loaded, 2 * kFactorBox + kBytesOfB - (kFault == too_few_bytes ? 128 : 0) +
                                          (kFault == too_many_bytes ? 128 : 0));
        for (int i = 0; i < 2; ++i) {
          const int64_t of_box = row + 64 * i;
          if (kA == Lies::kColumnsOfK) {
            load_box(a + i * kFactorBox, of_a, of_box, k, loaded);
          } else {
            load_box(a + i * kFactorBox, of_a, k, of_box, loaded);
          }
        }
        if (kB == Lies::kColumnsOfK) {
          load_box(b, of_b, column, k, loaded);
        } else {
          for (int i = 0; i < kN / 64; ++i) load_box(b + i * kFactorBox, of_b, k, column + 64 * i, loaded);
        }
      }
    }
  } else {
    registers_up<kFault == too_many_registers ? 240 : 232>();
    const int consumer = warpgroup_id() - 1;
    const bool elected = thread_id() % kWarpgroup == 0;
    constexpr bool kEachArrives = kAllArrive && kFault != freed_by_one_of_many;
    const auto free = [&](Barrier* stage) {
      if (kEachArrives || elected) barrier_arrive(stage);
      if (kFault == arrives_twice && elected) barrier_arrive(stage);
    };
    float d[kN / 2];
    Barrier* before = nullptr;  // the stage that products in flight read
    RingPlace<kStages> place(kFault == wrong_parity_of_consumers ? 1 : 0);
    for (int64_t k = 0; k < depth; k += kDepth, place.advance()) {
      if (kFault != no_wait_for_loads) barrier_wait(full + place.stage, place.parity);
      unsigned char* const a = a_stages + (place.stage * 2 + consumer) * kFactorBox;
      unsigned char* const b = b_stages + place.stage * kBytesOfB;
      if (kTouched) {
        uint32_t* const word = reinterpret_cast<uint32_t*>(a) + thread_id() % kWarpgroup;
        *word = *word ^ 0x80008000u;
        if (kFault != factor_not_fenced) fence_shared_for_bulk();
        sync_threads(1 + consumer, kWarpgroup);  // all signs have changed before products read them
      }
      uint32_t fragments[4][4];
      if (kInRegisters) load_fragments(fragments, a);
      if (kFault == no_wgmma_fence_of_a) wgmma_fence(d);
      if (kFault != no_wgmma_fence && kFault != no_wgmma_fence_of_a) wgmma_fence(d, fragments);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        constexpr int kStepA = kA == Lies::kColumnsOfK ? 32 : 2048,
                      kStepB = kB == Lies::kColumnsOfK ? 32 : 2048;
        const unsigned char* const of_b = b + step * kStepB;
        Factor b_now = kB == Lies::kColumnsOfK ? columns_of_k(of_b) : rows_of_k(of_b, kFactorBox);
        if (kFault == strides_exchanged) b_now = {detail::descriptor(of_b, 1024, kFactorBox)};
        if (kFault == lies_otherwise) b_now = rows_of_k(of_b, kFactorBox);
        if (kFault == begins_between) b_now = columns_of_k(of_b + 16);
        const bool add = k > 0 || step > 0;
        if constexpr (kInRegisters) {
          wgmma<T, kB>(d, fragments[step], b_now, add);
        } else {
          const unsigned char* const of_a = a + step * kStepA;
          wgmma<T, kA, kB>(d, kA == Lies::kColumnsOfK ? columns_of_k(of_a) : rows_of_k(of_a, kFactorBox),
                           b_now, add);
        }
      }
      if (kFault != no_wgmma_commit) wgmma_commit();
      Barrier* const stage = empty + place.stage;
      if (kFault == freed_before_wgmma_wait) free(stage);
      if (kFault == factor_overwritten) *reinterpret_cast<uint32_t*>(a) = 0;
      if (kFault == written_before_wgmma_wait) d[kN / 2 - 1] = 0;
      if (kFault == read_before_wgmma_wait && d[0] > 1e30f) return;
      if (kInFlight) {
        wgmma_wait<1>(d);
        if (kFault == freed_one_too_early) before = stage;
        if (before != nullptr) free(before);
        before = stage;
      } else {
        if (kFault != no_wgmma_wait) wgmma_wait<0>(d);
        if (kFault != freed_before_wgmma_wait) free(stage);
      }
    }
    if (kInFlight) wgmma_wait<0>(d);

    // One after the other, as kernels do whose warpgroups are to compute in turns.
    if (consumer == 1) sync_threads(3, 2 * kWarpgroup);
    unsigned char* const output = outputs + consumer * 64 * kN * 4;
    const int first_row = thread_id() % kWarpgroup / kWarp * 16 + lane_id() / 4;
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int of_row = first_row + 8 * (i / 2 % 2), of_column = 8 * (i / 4) + 2 * (lane_id() % 4) + i % 2;
      if (kFault == lost_row && of_row == 63) continue;
      unsigned char* const box = output + of_column / 32 * kFactorBox;
      float* const at = kFault == not_swizzled
                            ? reinterpret_cast<float*>(box) + of_row * 32 + of_column % 32
                            : reinterpret_cast<float*>(word_in_box(box, of_row, of_column % 32));
      *at = d[i];
    }
    if (consumer == 0 && kFault != no_turn_given) arrive_threads(3, 2 * kWarpgroup);
    if (kFault != no_fence_for_bulk && kFault != fence_after_meeting) fence_shared_for_bulk();
    // What all have written is there before one stores it.
    if (kFault != no_meeting_before_store)
      sync_threads(1 + consumer, kFault == wrong_threads ? 256 : kWarpgroup);
    if (kFault == fence_after_meeting) fence_shared_for_bulk();
    if (elected) {
      for (int i = 0; i < kN / 32; ++i)
        store_box(of_out, row + 64 * consumer, column + 32 * i, output + i * kFactorBox);
      if (kFault != no_commit_of_stores) commit_stores();
      if (kFault == buffer_reused) *reinterpret_cast<float*>(output) = 0;
      if (kFault != no_wait_for_stores) {
        wait_stores_read<0>();
        wait_stores<0>();
      }
    }
  }
  if (kFault != gives_up_unheard) barriers_held();
}

// The product and, right of it, what must not be written: as far as the stores' boxes go if `beyond`, else 4 columns.
template <class T, Lies kA, Lies kB, int kN, bool kInRegisters, bool kInFlight, bool kTouched, int kFault>
Tensor run(const char* name, const Tensor& a, const Tensor& b, bool beyond = false) {
  Queue queue(a);
  constexpr bool kTurnedA = kA == Lies::kRowsOfK, kTurnedB = kB == Lies::kRowsOfK;
  const int64_t rows = a.size(kTurnedA ? 1 : 0), columns = b.size(kTurnedB ? 1 : 0);
  const int64_t tiles = (columns + kN - 1) / kN, stored = beyond ? tiles * kN : columns;
  Tensor out = torch::stable::new_empty(a, {rows, (stored + 3) / 4 * 4 + 4}, ScalarType::Float);
  torch::stable::fill_(out, NAN);
  const auto map = [&](const Tensor& x, int64_t used_columns, int box_rows) {
    return tensor_map(name, x.const_data_ptr(), x.scalar_type(), x.size(0), used_columns, x.stride(0),
                      box_rows);
  };
  constexpr int kDepth = kBoxBytes / sizeof(Memory<T>);
  launch(name, queue, product<T, kA, kB, kN, kInRegisters, kInFlight, kTouched, kFault>,
         {(rows + kRows - 1) / kRows, tiles}, kProductThreads, product_bytes<kN>(), map(out, stored, 64),
         map(a, a.size(1), kTurnedA ? kDepth : 64), map(b, b.size(1), kTurnedB ? kDepth : kN),
         b.size(kTurnedB ? 0 : 1));
  return out;
}

template <class T, Lies kA, Lies kB, int kN, bool kInRegisters>
Tensor right(const Tensor& a, const Tensor& b) {
  return run<T, kA, kB, kN, kInRegisters, false, false, none>("product", a, b);
}

constexpr Lies kColumns = Lies::kColumnsOfK, kRowsLie = Lies::kRowsOfK;

template <class T, int kN>
Tensor product_of(const Tensor& a, const Tensor& b, bool turned_a, bool turned_b, bool in_registers) {
  if constexpr (!std::is_same_v<T, Tf32>) {
    if (turned_a && turned_b) return right<T, kRowsLie, kRowsLie, kN, false>(a, b);
    if (turned_a) return right<T, kRowsLie, kColumns, kN, false>(a, b);
    if (turned_b && in_registers) return right<T, kColumns, kRowsLie, kN, true>(a, b);
    if (turned_b) return right<T, kColumns, kRowsLie, kN, false>(a, b);
  }
  if (in_registers) return right<T, kColumns, kColumns, kN, true>(a, b);
  return right<T, kColumns, kColumns, kN, false>(a, b);
}

// a [M, K], or [K, M] if turned, b the same with N; kN of `columns`.
Tensor product_op(const Tensor& a, const Tensor& b, bool turned_a, bool turned_b, bool in_registers,
                  int64_t columns) {
  if (a.scalar_type() == ScalarType::Float)
    return product_of<Tf32, 64>(a, b, turned_a, turned_b, in_registers);
  if (a.scalar_type() == ScalarType::Half)
    return product_of<Half, 128>(a, b, turned_a, turned_b, in_registers);
  switch (columns) {
    case 64:
      return product_of<BFloat16, 64>(a, b, turned_a, turned_b, in_registers);
    case 192:
      return product_of<BFloat16, 192>(a, b, turned_a, turned_b, in_registers);
    default:
      return product_of<BFloat16, 256>(a, b, turned_a, turned_b, in_registers);
  }
}

// b's columns beyond the last, which nobody has written anywhere.
Tensor beyond_op(const Tensor& a, const Tensor& b) {
  return run<BFloat16, kColumns, kColumns, 64, false, false, false, none>("beyond", a, b, true);
}

template <int kFault>
Tensor faulty_or_right(const char* name, const Tensor& a, const Tensor& b, bool faulty) {
  constexpr Lies kB = kFault == strides_exchanged ? kRowsLie : kColumns;
  constexpr bool kInRegisters = in_registers(kFault), kInFlight = in_flight(kFault),
                 kTouched = touched(kFault);
  return faulty ? run<BFloat16, kColumns, kB, 64, kInRegisters, kInFlight, kTouched, kFault>(name, a, b)
                : run<BFloat16, kColumns, kB, 64, kInRegisters, kInFlight, kTouched, none>(name, a, b);
}

#define FAULTY(name)                                                \
  Tensor name##_op(const Tensor& a, const Tensor& b, bool faulty) { \
    return faulty_or_right<name>(#name, a, b, faulty);              \
  }
FOR_EACH_FAULT(FAULTY)
#undef FAULTY

}  // namespace

STABLE_TORCH_LIBRARY(NF_NAMESPACE, m) {
#define DEFINE(name) m.def(#name "(Tensor a, Tensor b, bool faulty) -> Tensor");
  FOR_EACH_FAULT(DEFINE)
  m.def("beyond(Tensor a, Tensor b) -> Tensor");
  m.def(
      "product(Tensor a, Tensor b, bool turned_a, bool turned_b, bool in_registers, int columns) -> Tensor");
}

NF_CUDA_LIBRARY(m) {
#define IMPLEMENT(name) m.impl(#name, TORCH_BOX(&name##_op));
  FOR_EACH_FAULT(IMPLEMENT)
  m.impl("beyond", TORCH_BOX(&beyond_op));
  m.impl("product", TORCH_BOX(&product_op));
}
