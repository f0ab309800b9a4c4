"""How is the second pass run inside another framework's loop?"""

__all__: list[str] = []
