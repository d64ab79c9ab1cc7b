"""`residrop analyze`: the instruments of `residrop.theory` on a run, a model by name or a Vanilla network."""
