// csrc/cuda/device/arrival.cuh for a CPU: ../watch.h knows which blocks have come, so that reading what a
// block wrote that has not is a race like any other.
#pragma once

#include <device/launch.cuh>

namespace nf {

inline bool last_to_arrive(unsigned* counter, unsigned blocks,
                           emulation::Where where = emulation::Where::current()) {
  emulation::meet_block(where);
  if (thread_id() == 0) emulation::arrive(counter, blocks);
  emulation::meet_block(where);
  return emulation::arrived_last();
}

template <class Team>
inline bool last_to_arrive(unsigned* counter, unsigned blocks, const Team& team, unsigned*) {
  team.sync();
  if (team.me() == 0) emulation::arrive(counter, blocks);
  team.sync();
  return emulation::arrived_last();
}

}  // namespace nf
