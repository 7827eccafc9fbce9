"""What do pages share? Cards, controls, grids, texts."""
