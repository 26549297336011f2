"""Distances to agents, and the losses of pairs and triplets of rows."""
