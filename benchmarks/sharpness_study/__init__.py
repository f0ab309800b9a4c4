"""How sharp the benchmarks' models end, by several measures, beside how well they do."""
