"""Trains real models with and without sharpness-aware optimizers; ``python -m benchmarks --help`` lists the studies."""
