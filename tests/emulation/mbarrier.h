// Barriers in shared memory that count arrivals and bytes, see device/mbarrier.cuh. As late as the rules allow: what
// bulk copies bring is there when a wait has passed, and not before.
#pragma once

#include "block.h"
#include "bulk.h"

namespace nf::emulation {

void init_barrier(void* at, int arrivals);
// By the running thread's bulk copies the barriers it has made are seen from here on, and by other threads.
void fence_made_barriers();
// The running thread arrives, and so many bytes are expected.
void arrive_at_barrier(void* at, unsigned bytes);
void wait_at_barrier(void* at, unsigned parity, Where where);
// The same of another block of the cluster.
void arrive_at_barrier_of(void* at, int of_rank);
// The bytes of `load`, which begins now, are counted there.
void load_to_barrier(void* at, const Load& load);
// The same box into each block of the cluster, and to each one's barrier.
void load_to_barriers(void* at, const Load& load);

// On a GPU a wait may give up: each thread that waits has to ask afterwards whether one did.
void hear_of_waits();

void barriers_begin();
void barriers_end();  // for the running thread, which exits

}  // namespace nf::emulation
