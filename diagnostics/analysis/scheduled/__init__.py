"""How is a run analysed that does not fit into memory, or by several workers? In tasks that read their part themselves."""
