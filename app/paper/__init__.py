"""How does a run go into a paper? Figures, tables, snippets, sources and a manifest."""
