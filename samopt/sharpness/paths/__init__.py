"""What does the loss look like along lines and planes?"""

__all__: list[str] = []
