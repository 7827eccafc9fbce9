"""What do all benchmarks share? Worker processes, medians of rounds, memory, tables."""
