"""Fifty small networks in many people's styles that the package was not made on, each with its own truth."""
