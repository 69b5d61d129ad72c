"""Readers of scenes, one format each; `hess_plugin.scenes.reading` lists them."""
