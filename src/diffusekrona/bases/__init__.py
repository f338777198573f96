"""Base models: loading one, quantizing it meanwhile, and known architectures without weights."""
