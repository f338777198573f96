"""Adapters between programs: whose file it is, what it says of which layer, and what it can become."""
