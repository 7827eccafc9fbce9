"""Which metrics can a run feed, with which errors and notes? Every one of them, in one pass."""
