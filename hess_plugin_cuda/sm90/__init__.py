"""The Hopper backend: a kernel compiled beforehand, launched through the CUDA driver; see `launch`."""
