"""The command line: how are models, weights and data named, what is written, and what are the options?"""

__all__: list[str] = []
