"""What do the checkpoints of one training tell together? One history, by the step of each."""
