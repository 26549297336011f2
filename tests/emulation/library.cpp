// The schemas of the library once more, in a namespace of the test build's own (-DNF_NAMESPACE=…).
#include <schemas.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(NF_NAMESPACE, m) { nf::define_ops(m); }
