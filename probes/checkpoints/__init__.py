"""How does a model come from files? Folders, GGUF, factories, weight files, sample text."""
