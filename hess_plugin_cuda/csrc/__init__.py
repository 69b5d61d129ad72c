"""Sources of the Hopper kernel, and `build`, which compiles them; nothing here is imported to compute attention."""
