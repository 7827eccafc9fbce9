"""What do the connections of a network do? Their proof in every run, from what they are computed, and what is odd of them."""
