"""What do all measures share?"""

__all__: list[str] = []
