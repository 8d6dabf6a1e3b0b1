"""What the objectives cost: ``python -m reweigh.benchmarks.speed``. Figures are ratios to a floor, never asserted."""
