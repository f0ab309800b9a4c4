"""Who is calling? Inspects the frameworks around a step, and imports none of them."""

__all__: list[str] = []
