"""Which radius, and will it help at all?"""

__all__: list[str] = []
