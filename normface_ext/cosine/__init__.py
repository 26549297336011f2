"""normalize and norm_linear."""
