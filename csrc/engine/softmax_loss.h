// The softmax's loss over classes that are all here, in one op, and its backward: head_sweep, softmax_finish and
// head_backward (head_arguments.h) with what they leave for one another in one tensor, `saved`. A small step is mostly
// calls and allocations.
#pragma once

#include "engine/block.h"
#include "engine/softmax_loss_arguments.h"

namespace nf {

// The tensors in `saved`, one behind another in this order; normface_ext/engine/saved.py knows it too.
class Saved {
 public:
  Saved(const HeadInputs& in, const SavedParts& parts, const StoredCells& cells)
      : batch_(in.x.size(0)),
        dim_(in.x.size(1)),
        keep_x_(parts.keep_x),
        slope_fields_(parts.need_margin ? kAllSlopes : kSlopeFields),
        place_(in.x) {
    const ScalarType wide = accumulator(in.x.scalar_type());
    rows_ = block_.array<double>(kRowFields * batch_);
    slopes_ = block_.array<double>(slope_fields_ * batch_);
    inverse_norm_ = block_.array(in.weight.size(0), wide);
    x_sum_ = block_.array(keep_x_ ? batch_ * dim_ : 0, wide);
    class_sum_ = block_.array(parts.need_class_sum ? dim_ + 1 : 0, wide);
    stored_ = block_.array(parts.store ? cells.count : 0, cells.type);
  }
  int64_t count() const { return block_.bytes() / 8; }
  void lie_in(const Tensor& memory) { block_.lie_in(memory); }

  SweepResult swept() const { return {rows_, inverse_norm_, x_sum_, class_sum_, stored_, {}, {}}; }
  const Array& slopes() const { return slopes_; }

  // As head_backward takes them.
  void give(HeadBackwardArguments& to) const {
    to.rows = view_of(rows_, {kRowFields, batch_}, place_);
    to.slopes = view_of(slopes_, {slope_fields_, batch_}, place_);
    to.inverse_norm = view_of(inverse_norm_, {inverse_norm_.count()}, place_);
    to.x_sum = keep_x_ ? view_of(x_sum_, {batch_, dim_}, place_) : view_of(x_sum_, {0}, place_);
    to.class_sum = view_of(class_sum_, {class_sum_.count()}, place_);
    to.stored = view_of(stored_, {stored_.count()}, place_);
  }

 private:
  Block block_;
  int64_t batch_, dim_;
  bool keep_x_;
  int64_t slope_fields_;
  Place place_;
  Array rows_, slopes_, inverse_norm_, x_sum_, class_sum_, stored_;
};

// `Device` says how tensors are made (fresh), how E is laid out (cells), and has the stages: sweep, finish, backward.
template <class Device>
std::tuple<Tensor, Tensor> softmax_loss(const SoftmaxLossArguments& in) {
  HeadSweepArguments swept;
  static_cast<HeadInputs&>(swept) = in;
  swept.sample_weight = in.sample_weight;
  swept.store = in.parts.store;
  swept.need_x = in.parts.keep_x;
  swept.need_class_sum = in.parts.need_class_sum;
  swept.need_largest = in.need_largest;
  swept.sink = kNoSink;
  swept.capacity = 0;
  swept.ignore_index = in.ignore_index;
  check_sweep(in.kName, swept);
  const FinishInputs finish{in, in, in.x, in.scale, in.m1, in.m2, in.m3, in.parts.need_margin};
  check_finish(in.kName, finish);
  const ScalarType wide = accumulator(in.x.scalar_type());
  Saved saved(in, in.parts, Device::cells(in));
  const Tensor memory = Device::fresh(in.x, {saved.count()}, ScalarType::Double),
               loss = in.reduction == kNone ? Device::fresh(in.x, {in.x.size(0)}, wide)
                                            : Device::fresh(in.x, {}, wide);
  saved.lie_in(memory);
  const SweepResult found = saved.swept();
  Device::sweep(swept, found);
  Device::finish(finish, {found.rows, found.class_sum, loss, saved.slopes()});
  return {loss, memory};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> softmax_loss_backward(const SoftmaxLossBackwardArguments& in) {
  check_inputs(in.kName, in);
  Saved saved(in, in.parts, Device::cells(in));
  check_exact(in.kName, "saved", in.saved, ScalarType::Double, {saved.count()});
  saved.lie_in(in.saved);
  HeadBackwardArguments given;
  static_cast<HeadInputs&>(given) = in;
  given.grad_loss = in.grad_loss;
  saved.give(given);
  given.need_x = in.need_x;
  given.need_weight = in.need_weight;
  given.need_scale = in.need_scale;
  check_upstream(in.kName, in.grad_loss, in.x);
  return Device::backward(given);
}

}  // namespace nf
