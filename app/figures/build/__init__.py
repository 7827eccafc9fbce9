"""How does an analysis become what a figure shows? Its values, bands, laws, caption and alt text."""
