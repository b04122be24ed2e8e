"""What the end-to-end benchmarks share: models, recorded answers, competitors, rounds, tables."""
