"""What does a dashboard session remember? The runs that it may open, and those that are chosen."""
