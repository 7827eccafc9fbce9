"""What does a probe do while it is attached? The first forward, the later ones, and the sampling of sequences."""
