"""The commands; importing this package registers them."""

from benchmarks.commands import demo, frontier, lightning, report, sharpness, train, wordnet

__all__ = ["demo", "frontier", "lightning", "report", "sharpness", "train", "wordnet"]
