"""Which figures are there? One file a question."""
