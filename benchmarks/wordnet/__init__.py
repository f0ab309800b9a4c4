"""WordNet supersenses: fine-tuning a pretrained encoder on definitions, tested on definitions and on usage examples."""

__all__: list[str] = []
