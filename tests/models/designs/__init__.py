"""Public designs, re-written small, each with its own ground truth: `DESIGNS`."""
