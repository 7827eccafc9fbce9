"""How are numbers, sources and names written for a reader? In one place."""
