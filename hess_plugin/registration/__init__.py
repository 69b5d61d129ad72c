"""How adapters get into a plugin manager: installed ones, files that somebody names, and what is left out."""
