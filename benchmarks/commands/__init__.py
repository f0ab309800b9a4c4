"""The commands; importing this package registers them."""

from benchmarks.commands import demo, report, sharpness, train, wordnet

__all__ = ["demo", "report", "sharpness", "train", "wordnet"]
