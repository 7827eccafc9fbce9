"""How do small models of each family compare? The demo and the study."""
