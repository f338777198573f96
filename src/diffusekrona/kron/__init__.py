"""Kronecker products of tensors, and what they cost: tensors and integers only, no models."""
