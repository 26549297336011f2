"""Loading the libraries, calling ops, autograd, checks, planning: what all families stand on."""
