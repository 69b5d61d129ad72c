"""The folder that `hess-patch run` puts first on PYTHONPATH; it holds nothing but `sitecustomize`."""
