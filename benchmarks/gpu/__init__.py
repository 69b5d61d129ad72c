"""What `gpu_suite.py` measures, one section a file."""
