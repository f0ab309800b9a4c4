"""In which order does a step happen?"""

__all__: list[str] = []
