"""Accuracy against cost: every way to be sharpness-aware, from one pass a step to two."""
