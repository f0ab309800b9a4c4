"""The Lightning benchmark: a LightningModule with and without the callback, and its sharpness as it trains."""

__all__: list[str] = []
