"""What do pages share? Their declaration, charts, finding cards, controls, and the choice of runs."""
