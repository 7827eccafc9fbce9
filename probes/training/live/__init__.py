"""What is measured of a step while the training runs? Rows of metrics, what they show, and where they are reported."""
