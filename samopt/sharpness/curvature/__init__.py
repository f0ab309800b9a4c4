"""How curved is the loss? Hessian, Gauss-Newton and what is computed from them."""

__all__: list[str] = []
