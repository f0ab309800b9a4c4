"""The commands; importing this package registers them."""

from benchmarks.commands import demo, lightning, report, sharpness, train, wordnet

__all__ = ["demo", "lightning", "report", "sharpness", "train", "wordnet"]
