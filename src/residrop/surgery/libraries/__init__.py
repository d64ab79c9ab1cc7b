"""Which blocks the libraries have, and where their shortcuts and branches are."""
