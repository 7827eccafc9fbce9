"""How is a run sent around? As one HTML page."""
