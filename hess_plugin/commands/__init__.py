"""The commands of `hess-patch`: each parses, calls one function and prints."""
