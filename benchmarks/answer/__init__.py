"""Does the signal degenerate into one representation that is the same in all layers? Five designs of one size, trained."""
