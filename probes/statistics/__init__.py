"""Which sums are accumulated over every token? Norms, gains, moments, streamed spectra, weight updates."""
