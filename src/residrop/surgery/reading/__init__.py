"""Reading the branches of residual blocks from the source of their own forward.

A block is residual because its forward says so: somewhere in it stands a sum of a value and a function of that value.
Reading finds these sums, and cuts the statements that make up each branch out of the forward, so that a rule may leave
them out. Every operation stays that of the block's own source; only what is called, and when, is decided by rules.

`functions` gets sources, `questions` asks what a block itself has to say (which attributes are None, which class a
child has), `statements`, `expressions` and `calls` take a forward apart into `steps`, `sums` finds the branches among
them, `writing` writes the forward with rules in it, and `read` puts these together.
"""
