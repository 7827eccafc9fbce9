"""How are runs browsed? Pages, the components they share, and the state of a session."""
