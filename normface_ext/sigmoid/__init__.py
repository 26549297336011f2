"""Heads that ask of every class a yes or no of its own: SphereFace2."""
