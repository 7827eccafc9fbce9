"""Which rows and columns does a table have, and how is it written? By one typesetter."""
