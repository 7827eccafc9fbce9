"""How does a checkpoint become a model and a batch for it? Folders, GGUF, factories, weight files, text."""
