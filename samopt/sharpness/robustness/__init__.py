"""What survives of a model when its weights are rounded or shaken, its inputs attacked, or it learns something else?"""

__all__: list[str] = []
