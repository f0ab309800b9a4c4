"""What is logged, and under which names?"""

__all__: list[str] = []
