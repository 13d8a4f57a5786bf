"""What the benchmarks of retrieval share: questions with their evidence, what is measured of them, and the report."""
