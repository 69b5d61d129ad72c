"""Inference in less memory: what `patch(..., memory="lean")` changes in a model besides its attention."""
