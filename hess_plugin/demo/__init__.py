"""A small trained VGGT-like model and the synthetic rooms it was trained on: a demonstration on one CPU."""
