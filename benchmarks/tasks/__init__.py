"""The tasks; importing this package registers them."""

from benchmarks.tasks import digits, fashion_mnist

__all__ = ["digits", "fashion_mnist"]
