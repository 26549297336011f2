"""The losses over agents: C-contrastive and C-triplet."""
