"""Adapters that let a training framework drive samopt, each importing its framework only when used."""

__all__: list[str] = []
