"""Parts of `benchmarks/cost.py`: workloads, the two sides, measures, probes in processes of their own, report."""
