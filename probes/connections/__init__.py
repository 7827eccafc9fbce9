"""What does one connection between streams do? Detected, read and proven; one file a family in `families`."""
