"""Which of several models is flatter, and do the measures agree?"""

__all__: list[str] = []
