"""How is a figure built from an analysis? A measurement with its words, and one file for each kind of figure."""
