"""How do several processes measure one training together? Their sums are added, and the first of them writes."""
