"""Sampled prediction: what is certain is computed once, and samples share what their draws agree on."""
