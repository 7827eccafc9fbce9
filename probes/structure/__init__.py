"""What is the model made of? The trace of one forward, chains of blocks, stages, tracks and sites."""
