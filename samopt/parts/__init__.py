"""What can be chosen? Direction, geometry, radius and combination."""

__all__: list[str] = []
