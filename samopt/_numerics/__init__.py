"""Is it computed safely? Norms, low precision, stochastic rounding."""

__all__: list[str] = []
