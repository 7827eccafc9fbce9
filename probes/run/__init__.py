"""How does a run come from what was captured? Datasets, coverage, merging."""
