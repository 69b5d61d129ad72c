"""An example of a package that teaches hess-plugin a model: see `adapter`."""
