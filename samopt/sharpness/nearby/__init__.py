"""How much does the loss rise near the weights?"""

__all__: list[str] = []
