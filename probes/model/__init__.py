"""How is the user's model looked at without being changed? Hooks, contexts, arguments, layouts."""
