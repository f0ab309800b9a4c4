"""The command line of the measures."""

__all__: list[str] = []
