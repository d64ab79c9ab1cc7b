"""What libraries do around their blocks that a rule has to know of."""
