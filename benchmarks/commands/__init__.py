"""The commands; importing this package registers them."""

from benchmarks.commands import demo, report, train, wordnet

__all__ = ["demo", "report", "train", "wordnet"]
