"""Smaller plain networks out of one with residual blocks: which blocks to keep, and the network of just those."""
