// What the sweep collects on the CPU beside its sums (engine/terms.h: Sink). A thread goes over a contiguous run
// of tiles, so that what the threads found, joined in their order, is in the order of the classes: the same
// whatever their number and the size of a tile.
#pragma once

#include "cpu/row_terms.h"

namespace nf::cpu {

// The classes with a coefficient that is not 0. A thread keeps what fits its rows' lists, no more; which of it
// stays is known only when all have ended.
template <class T>
class ActiveList {
 public:
  ActiveList(const HeadShape& shape, int64_t capacity)
      : shape_(shape), capacity_(capacity), parts_(size_t(shape.slots)) {
    for (Part& part : parts_) {
      part.listed.assign(size_t(shape.batch), 0);
      part.places.resize(size_t(shape.chunk) + 1);
      part.values.resize(size_t(shape.chunk) + 1);
    }
  }

  void take(int64_t slot, const Tile& tile, const RowState& rows, const T* coefficients) {
    Part& part = parts_[size_t(slot)];
    for (int64_t i = 0; i < shape_.batch; ++i) {
      int64_t& listed = part.listed[size_t(i)];
      if (listed == capacity_ || rows[kRowWeight][i] == 0) continue;
      const int64_t active = accum_rows<T>().collect(coefficients + i * tile.width, tile.width, tile.first,
                                                     part.places.data(), part.values.data());
      const int64_t found = std::min(active, capacity_ - listed);
      part.classes.insert(part.classes.end(), part.places.begin(), part.places.begin() + found);
      part.coefficients.insert(part.coefficients.end(), part.values.begin(), part.values.begin() + found);
      if (found > 0) part.runs.push_back({i, found});
      listed += found;
    }
  }

  // listed, found [N, capacity]
  void finish(int64_t* listed, T* found) const {
    std::fill_n(listed, shape_.batch * capacity_, shape_.classes);
    std::fill_n(found, shape_.batch * capacity_, T(0));
    std::vector<int64_t> used(size_t(shape_.batch), 0);
    for (const Part& part : parts_) {
      size_t from = 0;
      for (const Run& run : part.runs) {
        int64_t& place = used[size_t(run.row)];
        const int64_t kept = std::min(run.count, capacity_ - place), to = run.row * capacity_ + place;
        std::copy_n(part.classes.data() + from, kept, listed + to);
        std::copy_n(part.coefficients.data() + from, kept, found + to);
        place += kept, from += size_t(run.count);
      }
    }
  }

 private:
  struct Run {
    int64_t row, count;
  };
  struct Part {
    std::vector<int64_t> listed;  // [N]
    std::vector<Run> runs;        // whose the entries below are, in their order
    std::vector<int64_t> classes;
    std::vector<T> coefficients;
    std::vector<int64_t> places;  // of one row of a tile
    std::vector<T> values;
  };

  const HeadShape& shape_;
  int64_t capacity_;
  std::vector<Part> parts_;
};

// The class of the largest cosine but the target's.
template <class T>
class Hardest {
 public:
  explicit Hardest(const HeadShape& shape)
      : shape_(shape), best_(size_t(shape.slots * shape.batch), Best{-T(INFINITY), shape.classes}) {}

  void take(int64_t slot, const Labels& labels, const Tile& tile, const RowState& rows, const T* cosines) {
    for (int64_t i = 0; i < shape_.batch; ++i) {
      if (rows[kRowWeight][i] == 0) continue;
      Best& best = best_[size_t(slot * shape_.batch + i)];
      around_target(labels.data[i], tile, [&](int64_t begin, int64_t end) {
        const T* row = cosines + i * tile.width;
        const int64_t place = accum_rows<T>().place_of_largest(row + begin, end - begin, best.cosine);
        if (place >= 0) best = {row[begin + place], tile.first + begin + place};
      });
    }
  }

  // What the threads found becomes that of the first.
  void join() {
    for (int64_t i = 0; i < shape_.batch; ++i) {
      Best& best = best_[size_t(i)];
      for (int64_t slot = 1; slot < shape_.slots; ++slot) {
        const Best& other = best_[size_t(slot * shape_.batch + i)];
        if (other.cosine > best.cosine || (other.cosine != other.cosine && best.cosine == best.cosine))
          best = other;
      }
    }
  }

  // cosines [N]
  void put_cosines(double* cosines) const {
    for (int64_t i = 0; i < shape_.batch; ++i) cosines[i] = double(best_[size_t(i)].cosine);
  }

  // listed, found [N]; put(i, sums) receives what the term makes of that one cell.
  template <class Put>
  void finish(const RowTerms<T>& terms, int64_t* listed, T* found, const Put& put) const {
    for (int64_t i = 0; i < shape_.batch; ++i) {
      Best best = best_[size_t(i)];
      listed[i] = best.place;
      found[i] = best.cosine;
      if (best.place < shape_.classes)
        put(i, terms.fold(&best.cosine, 1, terms.rows[size_t(i)], terms.numbers));
    }
  }

 private:
  struct Best {
    T cosine;
    int64_t place;  // C: there is none
  };

  const HeadShape& shape_;
  std::vector<Best> best_;  // [slots, N]
};

}  // namespace nf::cpu
