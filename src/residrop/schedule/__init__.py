"""Which blocks are present when, without torch: survival rates over depth, time and budget, and the draws of a step."""
