"""How do weights move, and return?"""

__all__: list[str] = []
