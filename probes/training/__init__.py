"""How is a training loop followed? The recorder and its steps."""
