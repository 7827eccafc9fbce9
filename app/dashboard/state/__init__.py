"""What does a dashboard session keep? The runs that may be opened and those chosen."""
