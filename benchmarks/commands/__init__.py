"""The commands; importing this package registers them."""

from benchmarks.commands import demo, frontier, lightning, optimizer, report, sharpness, train, wordnet

__all__ = ["demo", "frontier", "lightning", "optimizer", "report", "sharpness", "train", "wordnet"]
