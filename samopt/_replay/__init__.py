"""How does the second pass see what the first one saw?"""

__all__: list[str] = []
