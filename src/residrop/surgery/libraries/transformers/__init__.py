"""Hugging Face transformers: its layer drop, and the auxiliary losses of its mixtures of experts."""
