"""How are saved runs opened, analysed and judged? The same way in every face."""
