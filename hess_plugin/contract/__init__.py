"""What an adapter has to keep, as checks: each a function of a `Case` that returns what is wrong, or None."""
