// What agent_hinge knows of one row after the sweep: rows[field][i], float64, [kHingeFields, N]. All
// sums are over the classes other than the label, and add over shards of the classes; but where only the
// hardest class counts, value and slope are those of the shard with the largest kHingeBest, of equal
// ones the first. The threshold, the norm and whether the row counts are the same in every shard.
#pragma once

namespace nf {

enum HingeField {
  kHingeThreshold,    // t, in terms of distance
  kHingeInverseNorm,  // 1 / ||x||; whether a row is ignored is not to be told from it (kHingeCounts)
  kExcessSum,         // sum of the hinges (t - d)_+
  kLossValue,         // what the loss takes of them: all, the hardest one, or their exponentials
  kHingeSlope,        // sum of the slopes of those
  kHingeActive,       // number of active classes
  kHingeCosine,       // sum of the cosines
  kHingeBest,         // largest cosine, -inf where there is no other class
  kHingeBestClass,    // its class
  kHingeCounts,       // 1, and 0 for an ignored row
  kHingeFields
};

}  // namespace nf
