"""Glue for other people's training loops. Each file needs the package it is named after, and says so without it.

Any loop works without glue: every training forward of the attached model draws the plan of its own step. What the
callbacks add is that the draws go on where a saved training stopped, and, if wished, one plan per optimizer update.
Accelerate needs none: `accelerator.register_for_checkpointing(residrop.sampler_of(model))`.
"""
