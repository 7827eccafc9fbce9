"""How is the user's model observed without being changed? Hooks, autocast, arguments, masks, tensors and layouts."""
